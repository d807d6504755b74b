//! Hidden states for trainers: whole sequences, sent as they are computed.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use carryon_crds::common::Taps;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::base::schedule::training_batch;
use crate::exchange::SequenceStates;
use crate::kernel::{Arena, Backend, PageTable, Result, pages_for};
use crate::model::{Capture, Model, Pause, Plan, Slot, Tap};
use crate::numbers::RowFormat;

/// Bytes of a permit.
const UNIT: u64 = 1024;
/// Readers among whom the room for states is dealt: so many slow ones are needed to keep it from the others.
const READERS: u64 = 4;

/// Permits for so many bytes.
pub fn units(bytes: u64) -> usize {
    (bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS as u64) as usize
}

/// Room for states that a reader has not taken yet: its own, within that of all readers.
pub struct Room {
    own: Arc<Semaphore>,
    all: Arc<Semaphore>,
    capacity: usize,
    token_bytes: usize,
}

/// Room that is taken.
type Taken = [OwnedSemaphorePermit; 2];

impl Room {
    pub(super) fn new(all: Arc<Semaphore>, bytes: u64, token_bytes: usize) -> Self {
        let capacity = units(bytes / READERS);
        Self { own: Arc::new(Semaphore::new(capacity)), all, capacity, token_bytes }
    }

    /// Permits that a sequence takes; one that is larger than the room has it alone.
    fn share(&self, tokens: usize) -> usize {
        (tokens * self.token_bytes).div_ceil(UNIT as usize).min(self.capacity)
    }

    fn is_free(&self, tokens: usize) -> bool {
        self.share(tokens) <= self.own.available_permits().min(self.all.available_permits())
    }

    fn take(&self, tokens: usize) -> Option<Taken> {
        let share = self.share(tokens) as u32;
        let own = self.own.clone().try_acquire_many_owned(share).ok()?;
        Some([own, self.all.clone().try_acquire_many_owned(share).ok()?])
    }
}

/// A piece of the frames on their way to a reader; the last of a sequence brings the room that is free once it is taken.
pub type StatesOut = (Bytes, Option<Taken>);

/// Hidden states of whole sequences.
pub struct StatesJob {
    /// Sequences not run yet, with their place in the request.
    pub sequences: VecDeque<(usize, Vec<u32>)>,
    /// Where to read.
    pub taps: Taps,
    /// How the rows of each tap are sent.
    pub formats: Vec<RowFormat>,
    /// Who reads.
    pub out: UnboundedSender<StatesOut>,
    /// What the reader may still be sent before it takes some.
    pub room: Room,
    /// Its place in the bounded queue.
    pub permit: OwnedSemaphorePermit,
}

impl StatesJob {
    /// Whether somebody still waits for it.
    pub fn is_wanted(&self) -> bool {
        !self.out.is_closed()
    }

    /// Whether it can run now: its reader has room for what comes.
    pub fn is_ready(&self) -> bool {
        self.sequences.front().is_none_or(|(_, tokens)| self.room.is_free(tokens.len()))
    }

    /// Takes the sequences of the next batch, with the room they need.
    pub fn next_batch(&mut self, budget: usize, hidden_size: usize) -> (Vec<Vec<u32>>, Frames) {
        let count = training_batch(self.sequences.iter().map(|(_, tokens)| tokens.len()), budget).min(self.sequences.len());
        let (mut sequences, mut frames) = (Vec::with_capacity(count), VecDeque::with_capacity(count));
        while sequences.len() < count
            && let Some((place, tokens)) = self.sequences.front()
            && let Some(room) = self.room.take(tokens.len())
        {
            frames.push_back(OutgoingFrame {
                header: Some(SequenceStates::header(*place, tokens.len(), &self.formats, &self.taps, hidden_size)),
                tokens: tokens.len(),
                tap: 0,
                sent: 0,
                room,
            });
            sequences.extend(self.sequences.pop_front().map(|(_, tokens)| tokens));
        }
        let row_bytes = self.formats.iter().map(|format| format.row_bytes(hidden_size)).collect();
        let early = vec![VecDeque::new(); self.formats.len()];
        (sequences, Frames { frames, formats: self.formats.clone(), row_bytes, early, out: self.out.clone() })
    }
}

struct OutgoingFrame {
    /// Sent first.
    header: Option<Bytes>,
    tokens: usize,
    /// The tap that is sent, and bytes of it that were.
    tap: usize,
    sent: usize,
    room: Taken,
}

/// The frames of a batch. They travel sequence by sequence, each tap by tap; what is computed earlier is kept until its turn, so that of one long
/// sequence little more is kept than its reader has not taken.
pub struct Frames {
    frames: VecDeque<OutgoingFrame>,
    /// How the rows of each tap are sent, and the bytes of one.
    formats: Vec<RowFormat>,
    row_bytes: Vec<usize>,
    /// Of each tap, what was not sent yet.
    early: Vec<VecDeque<Bytes>>,
    out: UnboundedSender<StatesOut>,
}

impl Frames {
    /// The next rows of all sequences at a tap.
    fn push(&mut self, tap: usize, rows: Bytes) {
        self.early[tap].push_back(rows);
        while let Some(piece) = self.next() {
            // A reader that went away is noticed in the next pause.
            let _ = self.out.send(piece);
        }
    }

    fn next(&mut self) -> Option<StatesOut> {
        let frame = self.frames.front_mut()?;
        if let Some(header) = frame.header.take() {
            return Some((header, None));
        }
        let pieces = &mut self.early[frame.tap];
        let tap_bytes = frame.tokens * self.row_bytes[frame.tap];
        let first = pieces.front_mut()?;
        let piece = first.split_to(first.len().min(tap_bytes - frame.sent));
        if first.is_empty() {
            pieces.pop_front();
        }
        frame.sent += piece.len();
        if frame.sent == tap_bytes {
            (frame.tap, frame.sent) = (frame.tap + 1, 0);
        }
        let last = frame.tap == self.early.len();
        Some((piece, if last { self.frames.pop_front().map(|frame| frame.room) } else { None }))
    }
}

/// Computes the tap states of whole sequences and sends them. Every layer runs over all of them before the next, so
/// that keys and values take a layer's memory.
pub fn capture<B: Backend>(
    model: &Model<B>,
    arena: &mut Arena<B>,
    (sequences, frames): (&[Vec<u32>], &mut Frames),
    (taps, piece_rows): (&Taps, usize),
    pause: Pause<'_>,
) -> Result<()> {
    let mut pages = 0..;
    let mut tables: Vec<_> =
        sequences.iter().map(|tokens| PageTable { pages: pages.by_ref().take(pages_for(tokens.len())).collect(), length: 0 }).collect();
    let taken = pages.start;
    for page in 0..taken {
        arena.take(&model.backend, page)?;
    }
    let mut slots: Vec<_> = sequences.iter().zip(&mut tables).map(|(tokens, kv)| Slot { tokens, kv }).collect();
    let captures: Vec<_> = Tap::all(taps).map(|tap| Capture { tap, rows: None }).collect();
    let mut send = |tap: usize, _first: usize, rows: B::Rows| {
        let rows = model.backend.read_bytes(&rows, model.dtype)?;
        frames.push(tap, frames.formats[tap].convert(rows, model.dtype, model.config.hidden_size));
        Ok(())
    };
    // Whoever ended it in a pause knows.
    let _ = model.run(arena, &mut slots, Plan { piece_rows, captures: &captures }, &mut send, pause)?;
    (0..taken).for_each(|page| arena.give(&model.backend, page));
    Ok(())
}

#[cfg(test)]
mod tests {
    use carryon_crds::pool::Dtype;
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    fn job(lengths: &[usize], taps: &Taps, room: Room) -> (StatesJob, tokio::sync::mpsc::UnboundedReceiver<StatesOut>) {
        let (out, received) = unbounded_channel();
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let sequences = lengths.iter().enumerate().map(|(place, tokens)| (place, vec![7; *tokens])).collect();
        let formats = vec![RowFormat::Plain(Dtype::Float32); taps.count()];
        (StatesJob { sequences, taps: taps.clone(), formats, out, room, permit }, received)
    }

    fn room(kib: u64, token_bytes: usize) -> Room {
        let bytes = kib * UNIT * READERS;
        Room::new(Arc::new(Semaphore::new(units(bytes))), bytes, token_bytes)
    }

    #[test]
    fn frames_are_whole_whatever_the_order_in_which_their_rows_come() {
        // Layers may be named in any order; they are computed in their own.
        let taps = Taps { layers: vec![9, 4], final_norm: true };
        let (width, lengths) = (2, [3, 1, 2]);
        let number = |tap: usize, row: usize, column: usize| (tap * 100 + row * 10 + column) as f32;
        let rows = |tap: usize, rows: std::ops::Range<usize>| {
            let values: Vec<f32> = rows.flat_map(|row| (0..width).map(move |column| number(tap, row, column))).collect();
            crate::numbers::to_bytes(&values, Dtype::Float32)
        };
        let (mut job, mut received) = job(&lengths, &taps, room(1024, 24));
        let (sequences, mut frames) = job.next_batch(100, width);
        assert_eq!(sequences.len(), 3);
        let mut pieces = 0;
        for (tap, own) in [(1, 0..2), (1, 2..6), (0, 0..5), (0, 5..6), (2, 0..4), (2, 4..6)] {
            frames.push(tap, rows(tap, own));
            pieces += 1;
            let early: usize = frames.early.iter().flatten().map(Bytes::len).sum();
            assert!(pieces < 3 || early < 6 * 8 * 2, "the first sequence is on its way");
        }
        let found: Vec<u8> = std::iter::from_fn(|| received.try_recv().ok()).flat_map(|(piece, _)| piece).collect();
        let mut first = 0;
        let expected = lengths.iter().enumerate().flat_map(|(index, tokens)| {
            let own = first..first + tokens;
            first += tokens;
            let states = (0..3).map(|tap| rows(tap, own.clone())).collect();
            SequenceStates { index, tokens: *tokens, formats: job.formats.clone(), taps: states }.encode(&taps, width).concat()
        });
        assert_eq!(found, expected.collect::<Vec<_>>());
    }

    #[test]
    fn what_a_reader_has_not_taken_is_bounded_in_bytes() {
        let taps = Taps { layers: vec![1], final_norm: false };
        // Three sequences of a KiB each, and room for two.
        let (mut job, mut received) = job(&[4, 4, 4], &taps, room(2, 256));
        let (sequences, mut frames) = job.next_batch(100, 64);
        assert_eq!((sequences.len(), job.is_ready()), (2, false));
        frames.push(0, Bytes::from(vec![0; 8 * 256]));
        let (_header, room) = received.try_recv().unwrap();
        assert!(room.is_none() && !job.is_ready());
        drop(received.try_recv().unwrap());
        assert!(job.is_ready(), "the first was taken");
        // What is larger than the whole room runs when all of it is free.
        job.sequences[0].1 = vec![7; 1000];
        assert!(!job.is_ready());
        while received.try_recv().is_ok() {}
        assert!(job.is_ready());
        assert_eq!(job.next_batch(100, 64).0.len(), 1);
    }

    #[test]
    fn a_few_slow_readers_do_not_keep_the_room_from_others() {
        let all = Arc::new(Semaphore::new(units(4 * UNIT)));
        let rooms: Vec<_> = (0..5).map(|_| Room::new(all.clone(), 4 * UNIT, 1024)).collect();
        let taken: Vec<_> = rooms[..3].iter().map(|room| room.take(100).unwrap()).collect();
        assert!(rooms[3].is_free(100) && !rooms[0].is_free(1));
        let last = rooms[3].take(1);
        assert!(!rooms[4].is_free(1));
        drop((taken, last));
        assert!(rooms[4].is_free(1));
    }
}
