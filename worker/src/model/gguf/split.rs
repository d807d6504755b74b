//! GGUF files that are one: `NAME-00001-of-00003.gguf` has the metadata, and each of them a directory of its own tensors.

use std::fs::File;
use std::path::Path;

use super::Gguf;
use crate::model::error::ModelError;

/// Files that a model may be cut in.
const MAX_PARTS: usize = 10_000;
const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// The names of all files that the file `name` is one of by its name, itself included; none when it is whole.
pub fn parts(name: &str) -> Option<Vec<String>> {
    let (part, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = part.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let count: usize = Some(count).filter(|count| digits(count))?.parse().ok()?;
    let number: usize = Some(number).filter(|number| digits(number))?.parse().ok()?;
    let sound = (1..=MAX_PARTS).contains(&count) && (1..=count).contains(&number);
    sound.then(|| (1..=count).map(|number| format!("{stem}-{number:05}-of-{count:05}.gguf")).collect())
}

/// Opens the files that `first` is the first of, if it is one of several.
pub(super) fn add_others(first: &mut Gguf) -> Result<(), ModelError> {
    let count = first.integer(COUNT)?.map_or(1, |count| count as usize);
    if count <= 1 {
        return Ok(());
    }
    // The others lie beside the file itself, wherever a link to it is.
    let path = first.path().canonicalize().map_err(ModelError::read(first.path()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names = parts(&name).filter(|names| names.len() == count);
    let names =
        names.ok_or_else(|| ModelError::invalid(&path, COUNT, format!("it is one of {count} files, but has no name of one of {count}")))?;
    if first.integer(NUMBER)?.unwrap_or(0) != 0 || names[0] != name {
        return Err(ModelError::invalid(&path, NUMBER, format!("it is not the first of its {count} files: name {}", names[0])));
    }
    for (number, name) in names.iter().enumerate().skip(1) {
        add(first, number, count, &path.with_file_name(name))?;
    }
    match first.integer(TENSORS)? {
        Some(tensors) if tensors as usize != first.tensors.len() => {
            let problem = format!("{tensors} tensors are said to be in its {count} files, where {} are", first.tensors.len());
            Err(ModelError::invalid(&path, TENSORS, problem))
        }
        _ => Ok(()),
    }
}

fn add(first: &mut Gguf, number: usize, count: usize, path: &Path) -> Result<(), ModelError> {
    if !path.exists() {
        return Err(ModelError::invalid(
            first.path(),
            COUNT,
            format!("it is one of {count} files, of which {} is missing", path.display()),
        ));
    }
    let file = File::open(path).map_err(ModelError::read(path))?;
    let length = file.metadata().map_err(ModelError::read(path))?.len();
    let other = Gguf::read(path, file, length)?;
    let found = (other.integer(NUMBER)?.map(|number| number as usize), other.integer(COUNT)?.map(|count| count as usize));
    if found != (Some(number), Some(count)) {
        return Err(ModelError::invalid(path, NUMBER, format!("it is not number {number}, from 0 on, of {count} files")));
    }
    first.parts.extend(other.parts);
    for (name, mut place) in other.tensors {
        place.part = number;
        if let Some(there) = first.tensors.insert(name.clone(), place) {
            let other = first.parts[there.part].path.display();
            return Err(ModelError::invalid(path, name, format!("tensor appears twice, the other is in {other}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_which_files_are_one() {
        assert_eq!(
            parts("m-Q4-00002-of-00003.gguf").unwrap(),
            ["m-Q4-00001-of-00003.gguf", "m-Q4-00002-of-00003.gguf", "m-Q4-00003-of-00003.gguf"]
        );
        assert_eq!(parts("sub/m-00001-of-00001.gguf").unwrap(), ["sub/m-00001-of-00001.gguf"]);
        for whole in [
            "m.gguf",
            "m-00001-of-00003.safetensors",
            "m-1-of-3.gguf",
            "m-00004-of-00003.gguf",
            "m-00000-of-00000.gguf",
            "00001-of-00002.gguf",
        ] {
            assert_eq!(parts(whole), None, "{whole}");
        }
    }
}
