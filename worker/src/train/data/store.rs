//! The samples of a split in a file, read as they are needed: a set may be larger than the memory.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::sample::{Sample, Target};
use crate::train::error::TrainError;

/// Stands where others have the number of ranges that are learned: what follows is a label, several, a number, or a place in a group.
const LABEL: u32 = u32::MAX;
const LABELS: u32 = u32::MAX - 1;
const VALUE: u32 = u32::MAX - 2;
const PART: u32 = u32::MAX - 3;
const ANSWER: u32 = u32::MAX - 4;
/// Bytes of a number in the file.
const WORD: usize = 4;

/// Samples in the order of their lines, 12 bytes of memory each. The file has no name: whatever becomes of the trainer, nothing is left of it.
#[derive(Debug)]
pub struct Samples {
    file: File,
    folder: PathBuf,
    /// Where each ends in the file, bytes.
    ends: Vec<u64>,
    lengths: Arc<[u32]>,
    /// Samples that are compared with each other.
    group: usize,
    /// Tokens of each group.
    group_lengths: Arc<[u32]>,
}

impl Samples {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Tokens of each.
    pub fn lengths(&self) -> &Arc<[u32]> {
        &self.lengths
    }

    /// Tokens of each group of samples that are compared with each other, which are learned together: of each sample, where none is.
    pub fn group_lengths(&self) -> &Arc<[u32]> {
        &self.group_lengths
    }

    /// Numbers of the samples of group number `group`.
    pub fn group(&self, group: usize) -> std::ops::Range<usize> {
        group * self.group..(group + 1) * self.group
    }

    /// Sample number `index`, which must be below [`Self::len`]. Waits for the disk.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, index: usize) -> Result<Sample, TrainError> {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let mut bytes = vec![0; (self.ends[index] - start) as usize];
        let failed = TrainError::file("read samples in", &self.folder);
        self.file.read_exact_at(&mut bytes, start).map_err(failed)?;
        let mut words = bytes.as_chunks::<WORD>().0.iter().map(|word| u32::from_le_bytes(*word));
        let ids: Vec<u32> = words.by_ref().take(self.lengths[index] as usize).collect();
        let target = match words.next() {
            Some(LABEL) => Target::Label(words.next().unwrap_or_default()),
            Some(LABELS) => Target::Labels(words.collect()),
            Some(PART) => Target::Part(words.next().unwrap_or_default()),
            Some(ANSWER) => {
                let [part, start, end] = [(); 3].map(|()| words.next().unwrap_or_default());
                Target::Answer(part, start as usize..end as usize)
            }
            Some(VALUE) => {
                let [low, high] = [words.next(), words.next()].map(|word| u64::from(word.unwrap_or_default()));
                Target::Value(f64::from_bits(low | high << 32))
            }
            _ => {
                let ends: Vec<usize> = words.map(|word| word as usize).collect();
                Target::Tokens(ends.as_chunks::<2>().0.iter().map(|[start, end]| *start..*end).collect())
            }
        };
        Ok(Sample { ids, target })
    }
}

/// Takes samples one by one.
#[derive(Debug)]
pub struct Writer {
    file: BufWriter<File>,
    folder: PathBuf,
    ends: Vec<u64>,
    lengths: Vec<u32>,
}

impl Writer {
    /// A new file on the volume of `folder`, which is made when it is missing.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(folder: &Path) -> Result<Self, TrainError> {
        let file = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
        let file = file.map_err(TrainError::file("write samples in", folder))?;
        Ok(Self { file: BufWriter::with_capacity(1 << 18, file), folder: folder.to_owned(), ends: Vec::new(), lengths: Vec::new() })
    }

    /// Writes one more.
    ///
    /// # Errors
    /// There is no room for it, or it is one of more than 2³².
    pub fn push(&mut self, sample: &Sample) -> Result<(), TrainError> {
        self.write(sample).map_err(TrainError::file("write samples in", &self.folder))
    }

    fn write(&mut self, sample: &Sample) -> io::Result<()> {
        let word = |number: usize| u32::try_from(number).map_err(io::Error::other);
        word(self.ends.len() + 1)?;
        let mut words = sample.ids.clone();
        match &sample.target {
            Target::Label(label) => words.extend([LABEL, *label]),
            Target::Labels(labels) => words.extend(std::iter::once(LABELS).chain(labels.iter().copied())),
            Target::Part(part) => words.extend([PART, *part]),
            Target::Answer(part, range) => words.extend([ANSWER, *part, word(range.start)?, word(range.end)?]),
            Target::Value(value) => words.extend([VALUE, value.to_bits() as u32, (value.to_bits() >> 32) as u32]),
            Target::Tokens(ranges) => {
                words.push(word(ranges.len())?);
                for range in ranges {
                    words.extend([word(range.start)?, word(range.end)?]);
                }
            }
        }
        words.iter().try_for_each(|word| self.file.write_all(&word.to_le_bytes()))?;
        self.ends.push(self.ends.last().unwrap_or(&0) + (words.len() * WORD) as u64);
        self.lengths.push(word(sample.ids.len())?);
        Ok(())
    }

    /// What was written, to be read, in groups of `group` samples.
    ///
    /// # Errors
    /// There is no room for the last of it.
    pub fn finish(self, group: usize) -> Result<Samples, TrainError> {
        let Self { file, folder, mut ends, lengths } = self;
        let file = file.into_inner().map_err(|error| TrainError::file("write samples in", &folder)(error.into_error()))?;
        ends.shrink_to_fit();
        let lengths: Arc<[u32]> = lengths.into();
        let group_lengths = match group {
            1 => lengths.clone(),
            _ => lengths.chunks(group).map(|lengths| lengths.iter().sum()).collect(),
        };
        Ok(Samples { file, folder, ends, lengths, group, group_lengths })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_that_are_compared_are_learned_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(folder.path()).unwrap();
        for (part, length) in [(0, 2), (1, 5), (0, 3), (1, 1)] {
            writer.push(&Sample { ids: vec![7; length], target: Target::Part(part) }).unwrap();
        }
        let read = writer.finish(2).unwrap();
        assert_eq!((read.group_lengths().as_ref(), read.group(1)), (&[7, 4][..], 2..4));
        assert_eq!(read.read(3).unwrap().target, Target::Part(1));
    }

    #[test]
    fn samples_are_read_as_they_were_written_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let samples = [
            Sample { ids: vec![1, 2, u32::MAX, 4, 5], target: Target::Tokens(vec![1..2, 3..5]) },
            Sample { ids: vec![7], target: Target::Label(3) },
            Sample { ids: vec![7, 8], target: Target::Labels(vec![0, 5]) },
            Sample { ids: vec![9], target: Target::Labels(vec![]) },
            Sample { ids: vec![9], target: Target::Value(-3.1) },
            Sample { ids: vec![9, 8, 7], target: Target::Answer(1, 1..3) },
            Sample { ids: (0..70_000).collect(), target: (1..70_000).into() },
        ];
        let mut writer = Writer::new(&folder.path().join("new")).unwrap();
        samples.iter().for_each(|sample| writer.push(sample).unwrap());
        let read = writer.finish(1).unwrap();
        assert_eq!((read.len(), read.lengths().as_ref()), (7, &[5, 1, 2, 1, 1, 3, 70_000][..]));
        for index in [6, 0, 1, 0, 4, 5, 3, 2] {
            assert_eq!(read.read(index).unwrap(), samples[index]);
        }
        assert_eq!(std::fs::read_dir(folder.path().join("new")).unwrap().count(), 0, "no file has a name");
    }
}
