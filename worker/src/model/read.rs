//! Parts of a file, read on several threads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::ModelError;

/// Bytes that are worth a thread of their own.
const SHARE: usize = 8 << 20;
/// Threads that read one part at most.
const READERS: usize = 8;

/// The `length` bytes of `file` from `begin` on. One thread alone is slower than a good disk, and than memory that the file is in already.
pub fn read(path: &Path, file: &File, begin: u64, length: usize) -> Result<Vec<u8>, ModelError> {
    let readers = std::thread::available_parallelism().map_or(1, usize::from).min(READERS);
    let (mut bytes, share) = (vec![0; length], length.div_ceil(readers).max(SHARE));
    let read = |index: usize, part: &mut [u8]| file.read_exact_at(part, begin + (index * share) as u64);
    let (own, others) = bytes.split_at_mut(share.min(length));
    std::thread::scope(|scope| {
        let others: Vec<_> = others.chunks_mut(share).enumerate().map(|(index, part)| scope.spawn(move || read(index + 1, part))).collect();
        let own = read(0, own);
        let others = others.into_iter().map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        others.fold(own, |read, other| read.and(other))
    })
    .map_err(ModelError::read(path))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_put_together_in_order() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..3 * SHARE as u32).map(|place| (place ^ (place >> 13)) as u8).collect();
        std::io::Write::write_all(&mut file, &content).unwrap();
        for (begin, length) in [(0, 0), (5, 1), (3, SHARE), (1, SHARE + 1), (7, 3 * SHARE - 7)] {
            let bytes = read(file.path(), file.as_file(), begin as u64, length).unwrap();
            assert!(bytes == content[begin..begin + length], "{length} bytes from {begin} on");
        }
        assert!(read(file.path(), file.as_file(), 8, 3 * SHARE).unwrap_err().to_string().contains(file.path().to_str().unwrap()));
    }
}
