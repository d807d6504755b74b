//! Tensors as they lie in a checkpoint, read some rows at a time by the threads that want them: none is in memory as a whole.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::encoding::Encoding;
use super::error::ModelError;

/// Rows and columns of a block that has a scale of its own.
pub const SCALED_BLOCK: usize = 128;
/// Bytes that are read at a time, if they are so many rows at least.
const WINDOW: usize = 128 << 10;
const WINDOW_ROWS: usize = 16;
/// Windows that a thread keeps: rows of gate and up, or of queries, keys and values, are wanted in turns.
const WINDOWS: usize = 4;

/// A matrix (or vector: one row) of a checkpoint.
pub struct Tensor {
    /// Rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    encoding: Encoding,
    path: PathBuf,
    file: Arc<File>,
    begin: u64,
    row_bytes: usize,
    /// No other tensor has it.
    number: u64,
    /// Why rows could not be read.
    failure: Mutex<Option<std::io::Error>>,
    /// What the values of each block are multiplied by, ⌈rows / 128⌉ × ⌈cols / 128⌉.
    block_scales: Option<Vec<f32>>,
}

/// Rows of a tensor that a thread has read.
struct Window {
    tensor: u64,
    first: usize,
    bytes: Vec<u8>,
}

thread_local! {
    /// The one that was made first comes first.
    static READ: RefCell<Vec<Window>> = const { RefCell::new(Vec::new()) };
}

impl Tensor {
    /// The tensor whose first byte is byte `begin` of `file`, and that is wholly inside of it: `encoding.bytes(rows, cols)` is not none.
    pub fn new(rows: usize, cols: usize, encoding: Encoding, path: &Path, file: &Arc<File>, begin: u64) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let (path, file, number) = (path.to_owned(), file.clone(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let row_bytes = encoding.bytes(1, cols).unwrap_or(0);
        Self { rows, cols, encoding, path, file, begin, row_bytes, number, failure: Mutex::new(None), block_scales: None }
    }

    /// The same tensor with the values of each block of [`SCALED_BLOCK`]² multiplied by their scale: ⌈rows / 128⌉ × ⌈cols / 128⌉.
    ///
    /// # Errors
    /// When the scales cannot be read.
    pub fn with_block_scales(self, scales: &Self) -> Result<Self, ModelError> {
        debug_assert_eq!((scales.rows, scales.cols), (self.rows.div_ceil(SCALED_BLOCK), self.cols.div_ceil(SCALED_BLOCK)));
        let mut values = vec![0.0; scales.rows * scales.cols];
        values.chunks_exact_mut(scales.cols.max(1)).enumerate().for_each(|(row, values)| scales.row(row, values));
        scales.finish()?;
        Ok(Self { block_scales: Some(values), ..self })
    }

    /// Writes the values of `row` into `values` (`cols` long), zeros where it cannot be read: [`Self::finish`] tells.
    pub fn row(&self, row: usize, values: &mut [f32]) {
        if self.row_bytes == 0 {
            return;
        }
        let read = self.with_bytes(row, |bytes| self.encoding.decode(bytes, values));
        if let Err(error) = read {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            return values.fill(0.0);
        }
        if let Some(scales) = &self.block_scales {
            let blocks = self.cols.div_ceil(SCALED_BLOCK);
            for (values, scale) in values.chunks_mut(SCALED_BLOCK).zip(&scales[row / SCALED_BLOCK * blocks..]) {
                values.iter_mut().for_each(|value| *value *= scale);
            }
        }
    }

    /// Whether all rows that were asked for could be read.
    ///
    /// # Errors
    /// Why not.
    pub fn finish(&self) -> Result<(), ModelError> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failure.map_or(Ok(()), |error| Err(ModelError::read(&self.path)(error)))
    }

    /// All values of a vector.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn vector(&self) -> Result<Vec<f32>, ModelError> {
        let mut values = vec![0.0; self.cols];
        self.row(0, &mut values);
        self.finish()?;
        Ok(values)
    }

    /// Calls `run` with the bytes of a row, from the window that this thread has of them.
    fn with_bytes(&self, row: usize, run: impl FnOnce(&[u8])) -> std::io::Result<()> {
        let most = (WINDOW / self.row_bytes).max(WINDOW_ROWS);
        let first = row / most * most;
        READ.with_borrow_mut(|windows| {
            let known = windows.iter().position(|window| (window.tensor, window.first) == (self.number, first));
            let at = match known {
                Some(at) => at,
                None => {
                    let mut window = if windows.len() < WINDOWS { Window::empty() } else { windows.remove(0) };
                    window.bytes.resize(most.min(self.rows - first) * self.row_bytes, 0);
                    self.file.read_exact_at(&mut window.bytes, self.begin + (first * self.row_bytes) as u64)?;
                    (window.tensor, window.first) = (self.number, first);
                    windows.push(window);
                    windows.len() - 1
                }
            };
            run(&windows[at].bytes[(row - first) * self.row_bytes..][..self.row_bytes]);
            Ok(())
        })
    }
}

impl Window {
    fn empty() -> Self {
        Self { tensor: u64::MAX, first: 0, bytes: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn rows_are_read_in_any_order_and_what_is_cut_off_meanwhile_is_an_error() {
        let (rows, cols) = (100, 3000);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let values: Vec<f32> = (0..rows * cols).map(|value| value as f32).collect();
        file.write_all(&[7; 5]).unwrap();
        file.write_all(bytemuck::cast_slice(&values)).unwrap();
        let handle = Arc::new(File::open(file.path()).unwrap());
        let tensor = Tensor::new(rows, cols, Encoding::F32, file.path(), &handle, 5);
        let other = Tensor::new(rows - 1, cols, Encoding::F32, file.path(), &handle, 5 + 4 * cols as u64);
        let mut row = vec![0.0; cols];
        for index in [0, 99, 16, 15, 31, 32, 1, 98] {
            tensor.row(index, &mut row);
            assert_eq!(row, values[index * cols..][..cols]);
            other.row(index.min(98), &mut row);
            assert_eq!(row, values[(index.min(98) + 1) * cols..][..cols]);
        }
        tensor.finish().unwrap();
        file.as_file().set_len(4 * 50 * cols as u64).unwrap();
        tensor.row(60, &mut row);
        assert!(row.iter().all(|value| *value == 0.0));
        assert!(tensor.finish().unwrap_err().to_string().contains(file.path().to_str().unwrap()));
    }
}
