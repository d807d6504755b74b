//! A sequence that waits for what comes from outside: heads that read several bases.
//!
//! The pool whose head it is runs a token when the rows of the others at its position are there ([`OtherRows`]). The others follow ([`Follow`]): they run
//! the tokens that they are told of, keep their keys and values, and send the rows. Such a sequence has its place and its memory like any other; as
//! long as it waits it has no demand, and where all do, the device waits until it is woken. What a sequence may keep of rows that nobody takes is
//! bounded by a window, for which its route has taken room before it began: nobody who holds rows waits for room of somebody else.
//!
//! The base's own pass runs with the head's, when the rows are there. It could run before, but every answer would then be two steps a token, and the
//! steps of many answers would meet less often.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::engine::Engine;
use super::heads::Group;
use super::sequence::{Purpose, Sequence};
use crate::exchange::mixing::{ROWS_AHEAD, TapRows};
use crate::exchange::wire::{ErrorCode, WireError};
use crate::kernel::{Backend, Result};
use crate::model::Tap;
use crate::numbers::RowFormat;

/// Rows of further bases that a head reads, as they come.
pub struct OtherRows {
    /// Numbers of a row of each tap.
    widths: Vec<usize>,
    feed: UnboundedReceiver<std::result::Result<TapRows, WireError>>,
    /// In the order of their positions; the first may be done in part.
    held: VecDeque<TapRows>,
    /// Position behind the last row that has come.
    end: usize,
    /// What may still come; what is done is given back to it.
    window: Arc<Semaphore>,
    _room: OwnedSemaphorePermit,
}

impl OtherRows {
    /// Rows of taps of these widths, which come through `feed`: no more at a time than `window` has.
    pub fn new(
        widths: Vec<usize>,
        feed: UnboundedReceiver<std::result::Result<TapRows, WireError>>,
        window: Arc<Semaphore>,
        room: OwnedSemaphorePermit,
    ) -> Self {
        Self { widths, feed, held: VecDeque::new(), end: 0, window, _room: room }
    }

    /// Takes what has come.
    fn hear(&mut self) -> std::result::Result<(), WireError> {
        loop {
            match self.feed.try_recv() {
                Ok(rows) => {
                    let rows = rows?;
                    self.end += rows.rows;
                    self.held.push_back(rows);
                }
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    return Err(WireError::new(ErrorCode::Unavailable, "the states of the other bases ended before the answer"));
                }
            }
        }
    }

    /// Adds the rows of a tap at these positions, which have come, to `out`.
    fn read(&self, tap: usize, positions: Range<usize>, out: &mut Vec<f32>) {
        for rows in &self.held {
            let (from, to) = (positions.start.max(rows.first), positions.end.min(rows.first + rows.rows));
            if from < to {
                rows.read(tap, from - rows.first, to - from, self.widths[tap], out);
            }
        }
    }

    /// Drops what lies before `done`.
    fn forget(&mut self, done: usize) {
        while let Some(rows) = self.held.pop_front_if(|rows| rows.first + rows.rows <= done) {
            self.window.add_permits(rows.rows);
        }
    }
}

/// A frame of rows, and how many they are.
pub type FollowOut = std::result::Result<(Bytes, usize), WireError>;

/// What a sequence follows, and who is sent its rows.
pub struct Follow {
    /// Tokens as they become known; no more come when it is closed.
    pub tokens: UnboundedReceiver<std::result::Result<Vec<u32>, WireError>>,
    /// Most tokens that may come.
    pub max_tokens: usize,
    /// Where it is read.
    pub taps: Vec<Tap>,
    /// Who reads.
    pub out: UnboundedSender<FollowOut>,
    /// Rows that were sent and not taken yet.
    pub untaken: Arc<AtomicUsize>,
    /// Room for as many as there may be.
    pub room: OwnedSemaphorePermit,
}

impl Follow {
    /// Whether somebody reads.
    pub fn is_wanted(&self) -> bool {
        !self.out.is_closed()
    }

    /// Sends an error as the last thing; false when nobody reads.
    pub fn fail(&self, error: WireError) -> bool {
        self.out.send(Err(error)).is_ok()
    }
}

impl Sequence {
    /// Takes what has come from outside. What goes wrong there ends it.
    pub fn hear(&mut self) {
        if self.finished {
            return;
        }
        let heard = match (&mut self.purpose, self.head.as_mut().and_then(|own| own.others.as_mut())) {
            (Purpose::Follow(follow), _) => loop {
                match follow.tokens.try_recv() {
                    Ok(Ok(tokens)) => self.tokens.extend(tokens),
                    Ok(Err(error)) => break Err(error),
                    Err(TryRecvError::Empty) => break Ok(()),
                    Err(TryRecvError::Disconnected) => {
                        self.finished = true;
                        break Ok(());
                    }
                }
            },
            (_, Some(others)) => others.hear(),
            _ => Ok(()),
        };
        if let Err(error) = heard {
            self.fail_with(error);
        }
    }

    /// Tokens that may run now.
    pub fn can_run(&self) -> usize {
        match (&self.purpose, self.head.as_ref().and_then(|own| own.others.as_ref())) {
            (Purpose::Follow(follow), _) => ROWS_AHEAD.saturating_sub(follow.untaken.load(Ordering::Relaxed)),
            (_, Some(others)) => others.end.saturating_sub(self.done),
            _ => usize::MAX,
        }
    }

    /// Drops the rows of other bases that were read.
    pub fn forget_read(&mut self) {
        let done = self.done;
        if let Some(others) = self.head.as_mut().and_then(|own| own.others.as_mut()) {
            others.forget(done);
        }
    }
}

/// What the heads of a group read of further bases: of each tap the rows of all members, one after the other.
pub fn columns<B: Backend>(engine: &Engine<B>, parts: &[&mut Sequence], rows: &[Range<usize>], group: &Group) -> Result<Vec<B::Rows>> {
    let others = |place: &usize| parts[*place].head.as_ref()?.others.as_ref();
    let Some(first) = group.members.first().and_then(others) else { return Ok(Vec::new()) };
    let column = |(tap, width): (usize, &usize)| {
        let mut values = Vec::new();
        for place in &group.members {
            let done = parts[*place].done;
            if let Some(others) = others(place) {
                others.read(tap, done..done + rows[*place].len(), &mut values);
            }
        }
        engine.model.backend.write(&values, *width)
    };
    first.widths.iter().enumerate().map(column).collect()
}

/// Sequences of a step that follow, and are read at the same taps.
pub fn followers(parts: &[&mut Sequence]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (place, part) in parts.iter().enumerate() {
        let Purpose::Follow(follow) = &part.purpose else { continue };
        match groups.iter_mut().find(|group| group.taps == follow.taps) {
            Some(group) => group.members.push(place),
            None => groups.push(Group { members: vec![place], taps: follow.taps.clone() }),
        }
    }
    groups
}

/// Sends the members of a group the rows of a step.
pub fn send<B: Backend>(
    engine: &Engine<B>,
    parts: &[&mut Sequence],
    rows: &[Range<usize>],
    group: &Group,
    columns: &[B::Rows],
) -> Result<()> {
    let (backend, dtype, width) = (&engine.model.backend, engine.model.dtype, engine.model.config.hidden_size);
    let format = RowFormat::Plain(dtype);
    let mut taps = columns.iter().map(|column| backend.read_bytes(column, dtype)).collect::<Result<Vec<Bytes>>>()?;
    for place in &group.members {
        let count = rows[*place].len();
        let own = taps.iter_mut().map(|rows| (format, rows.split_to(count * format.row_bytes(width)))).collect();
        let frame = TapRows { first: parts[*place].done, rows: count, taps: own }.encode(&vec![width; group.taps.len()]);
        let Purpose::Follow(follow) = &parts[*place].purpose else { continue };
        follow.untaken.fetch_add(count, Ordering::Relaxed);
        // A reader that went away is noticed before the next step.
        let _ = follow.out.send(Ok((frame, count)));
    }
    Ok(())
}
