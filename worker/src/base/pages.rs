//! Who has which pages of keys and values, within a budget of bytes: pure, without device and clock.
//!
//! A sequence is admitted when all that it may ever need fits (**Invariant** so none fails for want of memory once it runs). Pages that are full
//! become *blocks*, named by the hash of all tokens up to their end: whoever comes with the same beginning goes on from them, whatever its head,
//! since the base's keys and values do not depend on it. A head's own pages hang on the block under the head's digest. Blocks that nobody uses are
//! kept until their room is needed, the longest unused first.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sha2::{Digest as _, Sha256};

use crate::kernel::{PAGE, pages_for};
use crate::model::Tap;

/// Names a block: it stands for all tokens from the first one to the block's last, within a namespace.
pub type BlockHash = [u8; 16];

/// The names of a sequence's full blocks, which follow from each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    root: BlockHash,
    names: Vec<BlockHash>,
}

impl Chain {
    /// The chain of a sequence without tokens. Sequences of different namespaces share nothing.
    pub fn new(namespace: &str) -> Self {
        Self { root: short(Sha256::digest(namespace.as_bytes()).as_slice()), names: Vec::new() }
    }

    /// Names the blocks that are full now; `tokens` begins with those it was given before.
    pub fn extend(&mut self, tokens: &[u32]) {
        for block in &tokens.as_chunks::<PAGE>().0[self.names.len()..] {
            let mut hasher = Sha256::new_with_prefix(self.names.last().unwrap_or(&self.root));
            block.iter().for_each(|token| hasher.update(token.to_le_bytes()));
            self.names.push(short(hasher.finalize().as_slice()));
        }
    }

    /// The names, from the first block on.
    pub fn names(&self) -> &[BlockHash] {
        &self.names
    }
}

fn short(digest: &[u8]) -> BlockHash {
    std::array::from_fn(|place| digest[place])
}

/// A number of a page in the arena of its layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Page {
    /// The arena, as [`Book::layout`] numbered it.
    pub layout: usize,
    /// The page in it.
    pub number: u32,
}

/// What a sequence may still take.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lease {
    bytes: u64,
}

/// What is given back and must be forgotten on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Freed {
    /// A page.
    Page(Page),
    /// The tap rows of a block.
    Block(BlockHash),
}

/// How much of a sequence's beginning is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Blocks whose keys and values of the base are there.
    pub blocks: usize,
    /// Those among them, from the first on, that have the head's own too; of the rest the tap rows are there.
    pub head_blocks: usize,
}

/// A head, as far as blocks know it.
#[derive(Clone, Copy, Debug)]
pub struct HeadKey<'a> {
    /// Its digest.
    pub digest: &'a str,
    /// Where it reads.
    pub taps: &'a BTreeSet<Tap>,
}

#[derive(Debug, Default)]
struct Numbers {
    bytes: u64,
    next: u32,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Block {
    base: Page,
    heads: HashMap<String, Page>,
    taps: BTreeSet<Tap>,
    bytes: u64,
    users: usize,
    used: u64,
}

/// The book.
#[derive(Debug)]
pub struct Book {
    budget: u64,
    layouts: Vec<Numbers>,
    blocks: HashMap<BlockHash, Block>,
    /// Blocks that nobody uses, the longest unused first.
    unused: BTreeMap<u64, BlockHash>,
    /// Bytes of all pages and tap rows.
    taken: u64,
    /// Those of blocks that nobody uses.
    idle: u64,
    /// Bytes of all leases.
    promised: u64,
    /// Counts uses.
    clock: u64,
    freed: Vec<Freed>,
}

impl Book {
    /// An empty book.
    pub fn new(budget: u64) -> Self {
        let (layouts, blocks, unused, freed) = (Vec::new(), HashMap::new(), BTreeMap::new(), Vec::new());
        Self { budget, layouts, blocks, unused, taken: 0, idle: 0, promised: 0, clock: 0, freed }
    }

    /// A new arena whose pages have `bytes` each.
    pub fn layout(&mut self, bytes: u64) -> usize {
        self.layouts.push(Numbers { bytes, ..Numbers::default() });
        self.layouts.len() - 1
    }

    /// Bytes in all.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Bytes that are taken, those of idle blocks included.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Bytes that `positions` positions take in these arenas.
    pub fn need(&self, layouts: &[usize], positions: usize) -> u64 {
        layouts.iter().map(|layout| self.layouts[*layout].bytes * pages_for(positions) as u64).sum()
    }

    /// Uses the blocks `known` and promises `bytes` beside them, if there is room for both; none where one has to wait.
    pub fn admit(&mut self, known: &[BlockHash], bytes: u64) -> Option<Lease> {
        let idle = known.iter().filter_map(|hash| self.blocks.get(hash)).filter(|block| block.users == 0).map(|block| block.bytes);
        if bytes + idle.sum::<u64>() > self.free() {
            return None;
        }
        known.iter().for_each(|hash| self.enter(hash));
        self.promised += bytes;
        Some(Lease { bytes })
    }

    /// Bytes that are neither in use nor promised.
    fn free(&self) -> u64 {
        self.budget.saturating_sub(self.taken - self.idle + self.promised)
    }

    /// Takes back what is left of a lease.
    pub fn end(&mut self, lease: &mut Lease) {
        self.promised -= std::mem::take(&mut lease.bytes);
    }

    /// A page, out of what was promised.
    ///
    /// # Panics
    /// When more is taken than was promised.
    pub fn take(&mut self, layout: usize, lease: &mut Lease) -> Page {
        let bytes = self.layouts[layout].bytes;
        assert!(bytes <= lease.bytes, "a sequence takes more than it was promised");
        (lease.bytes, self.promised) = (lease.bytes - bytes, self.promised - bytes);
        self.make_room(bytes);
        self.taken += bytes;
        let numbers = &mut self.layouts[layout];
        let number = numbers.free.pop().unwrap_or_else(|| {
            numbers.next += 1;
            numbers.next - 1
        });
        Page { layout, number }
    }

    /// Gives back a page that is no block's.
    pub fn give(&mut self, page: Page) {
        self.taken -= self.layouts[page.layout].bytes;
        self.layouts[page.layout].free.push(page.number);
        self.freed.push(Freed::Page(page));
    }

    /// How much of the chain is known to the base, and to the head.
    pub fn known(&self, chain: &[BlockHash], head: Option<HeadKey<'_>>) -> Known {
        let mut known = Known::default();
        for hash in chain {
            let Some(block) = self.blocks.get(hash) else { break };
            if let Some(head) = head {
                match block.heads.contains_key(head.digest) && known.head_blocks == known.blocks {
                    true => known.head_blocks += 1,
                    false if !block.taps.is_superset(head.taps) => break,
                    false => {}
                }
            }
            known.blocks += 1;
        }
        known
    }

    /// The page of a block.
    pub fn page(&self, hash: &BlockHash) -> Option<Page> {
        self.blocks.get(hash).map(|block| block.base)
    }

    /// The page of a head on a block.
    pub fn head_page(&self, hash: &BlockHash, digest: &str) -> Option<Page> {
        self.blocks.get(hash).and_then(|block| block.heads.get(digest)).copied()
    }

    fn enter(&mut self, hash: &BlockHash) {
        if let Some(block) = self.blocks.get_mut(hash) {
            if block.users == 0 {
                self.idle -= block.bytes;
                self.unused.remove(&block.used);
            }
            block.users += 1;
        }
    }

    /// Does not use these blocks any more. The last of a chain is the first to go.
    pub fn leave(&mut self, chain: &[BlockHash]) {
        for hash in chain.iter().rev() {
            self.clock += 1;
            if let Some(block) = self.blocks.get_mut(hash) {
                (block.users, block.used) = (block.users - 1, self.clock);
                if block.users == 0 {
                    self.idle += block.bytes;
                    self.unused.insert(block.used, *hash);
                }
            }
        }
    }

    /// Makes a block of a page that is full, used by the one who filled it. Where there is one already, the page is given back, and the block's own
    /// comes back in its stead: both hold the same.
    pub fn settle(&mut self, hash: BlockHash, page: Page) -> Page {
        if let Some(own) = self.page(&hash) {
            self.enter(&hash);
            self.give(page);
            return own;
        }
        let bytes = self.layouts[page.layout].bytes;
        let (heads, taps) = (HashMap::new(), BTreeSet::new());
        self.blocks.insert(hash, Block { base: page, heads, taps, bytes, users: 1, used: 0 });
        page
    }

    /// The same of a head's page, of a block that is in use.
    pub fn settle_head(&mut self, hash: &BlockHash, digest: &str, page: Page) -> Page {
        let bytes = self.layouts[page.layout].bytes;
        let Some(block) = self.blocks.get_mut(hash) else { return page };
        if let Some(own) = block.heads.get(digest).copied() {
            self.give(page);
            return own;
        }
        block.heads.insert(digest.to_owned(), page);
        block.bytes += bytes;
        page
    }

    /// Counts `bytes` of tap rows of a block that is in use; false where there is no room for them.
    pub fn keep_taps(&mut self, hash: &BlockHash, taps: &BTreeSet<Tap>, bytes: u64) -> bool {
        if bytes > self.free() || !self.blocks.contains_key(hash) {
            return false;
        }
        self.make_room(bytes);
        self.taken += bytes;
        if let Some(block) = self.blocks.get_mut(hash) {
            block.taps.extend(taps);
            block.bytes += bytes;
        }
        true
    }

    /// What was given back since the last call.
    pub fn freed(&mut self) -> Vec<Freed> {
        std::mem::take(&mut self.freed)
    }

    /// Drops idle blocks until `bytes` fit.
    fn make_room(&mut self, bytes: u64) {
        while self.taken + bytes > self.budget {
            let Some((_, hash)) = self.unused.pop_first() else { return };
            self.drop_block(&hash);
        }
    }

    fn drop_block(&mut self, hash: &BlockHash) {
        let Some(block) = self.blocks.remove(hash) else { return };
        let pages: u64 = block.heads.values().chain([&block.base]).map(|page| self.layouts[page.layout].bytes).sum();
        (self.taken, self.idle) = (self.taken - (block.bytes - pages), self.idle - block.bytes);
        block.heads.into_values().chain([block.base]).for_each(|page| self.give(page));
        self.freed.push(Freed::Block(*hash));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(namespace: &str, tokens: impl Iterator<Item = u32>) -> Chain {
        let mut chain = Chain::new(namespace);
        chain.extend(&tokens.collect::<Vec<_>>());
        chain
    }

    #[test]
    fn a_block_is_named_by_all_that_stands_before_its_end() {
        let whole = chain("a", 0..100);
        assert_eq!(whole.names().len(), 3);
        let mut grown = chain("a", 0..40);
        grown.extend(&(0..100).collect::<Vec<_>>());
        assert_eq!(grown, whole);
        assert_eq!(whole.names()[..2], chain("a", (0..64).chain(7..100)).names()[..2]);
        assert_ne!(whole.names()[2], chain("a", (1..65).chain(64..100)).names()[2], "the same tokens after others");
        assert_ne!(whole.names()[0], chain("b", 0..100).names()[0], "in another namespace");
    }

    /// Fills the blocks of a chain, as a sequence does that has run them.
    fn fill(book: &mut Book, layout: usize, chain: &Chain) {
        let mut lease = book.admit(&[], book.need(&[layout], chain.names().len() * PAGE)).unwrap();
        for hash in chain.names() {
            let page = book.take(layout, &mut lease);
            book.settle(*hash, page);
        }
        book.end(&mut lease);
    }

    #[test]
    fn who_is_admitted_has_all_that_was_promised_and_others_wait() {
        let mut book = Book::new(1000);
        let layout = book.layout(100);
        let mut lease = book.admit(&[], book.need(&[layout], 6 * PAGE)).unwrap();
        assert_eq!(book.admit(&[], 500), None);
        let mut small = book.admit(&[], 400).unwrap();
        let pages: Vec<_> = (0..6).map(|_| book.take(layout, &mut lease)).collect();
        assert_eq!((book.taken(), book.admit(&[], 1)), (600, None));
        pages.iter().for_each(|page| book.give(*page));
        assert_eq!(book.freed(), pages.into_iter().map(Freed::Page).collect::<Vec<_>>());
        assert!(book.admit(&[], 600).is_some());
        book.end(&mut small);
        assert!(book.admit(&[], 400).is_some());
    }

    #[test]
    fn blocks_are_shared_while_used_kept_while_there_is_room_and_go_from_the_end() {
        let mut book = Book::new(500);
        let layout = book.layout(100);
        let long = chain("a", 0..96);
        fill(&mut book, layout, &long);
        assert_eq!(book.known(long.names(), None), Known { blocks: 3, head_blocks: 0 });
        let mut other = book.admit(&long.names()[..2], 100).unwrap();
        book.leave(long.names());
        assert_eq!(book.taken(), 300);
        // Three are in use or promised: two more pages are there, and a third is that of the block that nobody uses.
        let mut lease = book.admit(&[], 200).unwrap();
        assert_eq!(book.admit(&[], 1), None);
        book.take(layout, &mut lease);
        book.take(layout, &mut lease);
        assert_eq!(book.freed(), []);
        book.end(&mut other);
        let mut last = book.admit(&[], 100).unwrap();
        book.take(layout, &mut last);
        assert_eq!(book.known(long.names(), None).blocks, 2, "the last of the chain has gone");
        assert!(book.freed().contains(&Freed::Block(long.names()[2])));
        assert_eq!(book.taken(), 500);
    }

    #[test]
    fn a_page_filled_twice_is_kept_once() {
        let mut book = Book::new(1000);
        let layout = book.layout(100);
        let one = chain("a", 0..32);
        let mut lease = book.admit(&[], 200).unwrap();
        let (first, second) = (book.take(layout, &mut lease), book.take(layout, &mut lease));
        assert_eq!(book.settle(one.names()[0], first), first);
        assert_eq!(book.settle(one.names()[0], second), first);
        assert_eq!((book.taken(), book.freed()), (100, vec![Freed::Page(second)]));
    }

    #[test]
    fn a_head_goes_on_from_its_own_pages_or_from_tap_rows() {
        let mut book = Book::new(10_000);
        let (base, head) = (book.layout(100), book.layout(10));
        let known = chain("a", 0..96);
        fill(&mut book, base, &known);
        let taps = BTreeSet::from([Tap::Layer(3), Tap::Final]);
        let own = Some(HeadKey { digest: "own", taps: &taps });
        assert_eq!(book.known(known.names(), own), Known::default());
        assert!(book.keep_taps(&known.names()[0], &BTreeSet::from([Tap::Layer(3), Tap::Layer(5), Tap::Final]), 50));
        assert!(book.keep_taps(&known.names()[1], &BTreeSet::from([Tap::Layer(3)]), 50));
        assert_eq!(book.known(known.names(), own), Known { blocks: 1, head_blocks: 0 });
        let mut lease = book.admit(&[], 30).unwrap();
        for hash in &known.names()[..2] {
            let page = book.take(head, &mut lease);
            assert_eq!(book.settle_head(hash, "own", page), page);
        }
        assert_eq!(book.known(known.names(), own), Known { blocks: 2, head_blocks: 2 });
        assert_eq!(book.known(known.names(), Some(HeadKey { digest: "other", taps: &taps })), Known { blocks: 1, head_blocks: 0 });
        let again = book.take(head, &mut lease);
        assert_eq!(Some(book.settle_head(&known.names()[0], "own", again)), book.head_page(&known.names()[0], "own"));
        assert_eq!(book.taken(), 3 * 100 + 2 * 50 + 2 * 10);
        assert!(!book.keep_taps(&known.names()[2], &taps, 10_000), "no room");
    }

    /// Many sequences that come and go, with beginnings in common: what is taken is what is held, and nobody who was admitted goes short.
    #[test]
    fn any_order_of_events_keeps_the_books() {
        let mut random = 1u64;
        let mut draw = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        let mut book = Book::new(4_000);
        let layout = book.layout(100);
        let mut running: Vec<(Lease, Chain, usize, Vec<Page>)> = Vec::new();
        for _ in 0..20_000 {
            match draw(3) {
                0 => {
                    let (kind, blocks) = (draw(4) as u32, 1 + draw(12) as usize);
                    let chain = chain("a", (0..(blocks * PAGE) as u32).map(|token| token + kind * u32::from(token > 64)));
                    let known = book.known(chain.names(), None).blocks;
                    if let Some(lease) = book.admit(&chain.names()[..known], 100 * (blocks - known) as u64) {
                        running.push((lease, chain, known, Vec::new()));
                    }
                }
                1 if !running.is_empty() => {
                    let place = draw(running.len() as u64) as usize;
                    let (lease, chain, shared, pages) = &mut running[place];
                    if *shared + pages.len() < chain.names().len() {
                        let page = book.take(layout, lease);
                        match draw(2) == 0 && pages.is_empty() {
                            true => {
                                book.settle(chain.names()[*shared], page);
                                *shared += 1;
                            }
                            false => pages.push(page),
                        }
                    }
                }
                _ if !running.is_empty() => {
                    let (mut lease, chain, shared, pages) = running.swap_remove(draw(running.len() as u64) as usize);
                    book.end(&mut lease);
                    pages.into_iter().for_each(|page| book.give(page));
                    book.leave(&chain.names()[..shared]);
                }
                _ => {}
            }
            let private: usize = running.iter().map(|(.., pages)| pages.len()).sum();
            assert_eq!(book.taken, 100 * (private + book.blocks.len()) as u64);
            assert_eq!(book.idle, book.blocks.values().filter(|block| block.users == 0).map(|block| block.bytes).sum::<u64>());
            assert_eq!(book.promised, running.iter().map(|(lease, ..)| lease.bytes).sum::<u64>());
            assert!(book.taken <= book.budget && book.taken - book.idle + book.promised <= book.budget);
        }
        assert!(book.blocks.len() > 10 && book.clock > 1000);
    }
}
