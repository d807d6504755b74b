//! `local logs`.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::args::LogsArgs;
use super::{Error, step, supervisor};

/// Prints the logs of a pod, or of all pods of an object.
pub fn logs(args: &LogsArgs) -> Result<(), Error> {
    let folder = args.state.state_dir.join("logs");
    let mut shown: Vec<(PathBuf, u64)> = Vec::new();
    let mut last = None;
    loop {
        for path in matching(&folder, &args.name).map_err(step("reading the logs"))? {
            if shown.iter().all(|(known, _)| *known != path) {
                shown.push((path, 0));
            }
        }
        if shown.is_empty() && !args.follow {
            return Err(Error::NotReached(format!("no log of {:?} in {}", args.name, folder.display())));
        }
        let several = shown.len() > 1;
        for (index, (path, offset)) in shown.iter_mut().enumerate() {
            let header = several && last != Some(index);
            if copy(path, offset, header).map_err(step("printing a log"))? {
                last = Some(index);
            }
        }
        if !args.follow {
            return Ok(());
        }
        std::thread::sleep(supervisor::PERIOD);
    }
}

/// Logs of pods called `name` or `name-…`, in the order of their names.
fn matching(folder: &Path, name: &str) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.retain(|path| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        stem.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '@']))
    });
    paths.sort();
    Ok(paths)
}

/// Copies what is new in `path` to stdout; whether anything was.
fn copy(path: &Path, offset: &mut u64, header: bool) -> io::Result<bool> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() <= *offset {
        return Ok(false);
    }
    file.seek(SeekFrom::Start(*offset))?;
    let mut out = io::stdout().lock();
    if header {
        writeln!(out, "==> {} <==", path.file_stem().unwrap_or_default().to_string_lossy())?;
    }
    let mut bytes = Vec::new();
    *offset += file.read_to_end(&mut bytes)? as u64;
    out.write_all(&bytes)?;
    out.flush()?;
    Ok(true)
}
