//! Pages of served sequences: the book, the arenas that it speaks of, and the tap rows of blocks.

use std::collections::{BTreeSet, HashMap};

use super::sequence::{HeadUse, Sequence};
use crate::base::pages::{BlockHash, Book, Freed, HeadKey, Page};
use crate::base::registry::LoadedHead;
use crate::kernel::{Arena, Backend, PAGE, PageLayout, PageTable, Result, first_seen, pages_for};
use crate::model::{Model, Tap};

/// Memory for keys and values.
pub struct Memory<B: Backend> {
    backend: B,
    book: Book,
    layouts: Vec<PageLayout>,
    arenas: Vec<Arena<B>>,
    /// Positions that a position of the base sees at most.
    window: Option<usize>,
    taps: HashMap<BlockHash, HashMap<Tap, B::Packed>>,
}

/// The base's arena.
const BASE: usize = 0;

impl<B: Backend> Memory<B> {
    /// Room for `budget` bytes.
    pub fn new(model: &Model<B>, budget: u64) -> Result<Self> {
        let (backend, book) = (model.backend.clone(), Book::new(budget));
        let window = model.config.window();
        let mut memory = Self { backend, book, layouts: Vec::new(), arenas: Vec::new(), window, taps: HashMap::new() };
        memory.layout(model.page_layout())?;
        Ok(memory)
    }

    /// Bytes in all, and those that are taken.
    pub fn usage(&self) -> (u64, u64) {
        (self.book.budget(), self.book.taken())
    }

    /// The arena of this layout.
    fn layout(&mut self, layout: PageLayout) -> Result<usize> {
        if let Some(index) = self.layouts.iter().position(|known| *known == layout) {
            return Ok(index);
        }
        let bytes = layout.bytes() as u64;
        // A head without blocks has pages without bytes; they are numbered all the same.
        let count = self.book.budget() / bytes.max(1 << 10);
        self.arenas.push(Arena::new(&self.backend, layout, count as usize)?);
        self.layouts.push(layout);
        Ok(self.book.layout(bytes))
    }

    fn head_layout(&mut self, head: &LoadedHead) -> Result<usize> {
        self.layout(head.runner::<B>().page_layout())
    }

    /// The arena of a head's keys and values.
    pub fn head_arena(&mut self, head: &LoadedHead) -> Result<&mut Arena<B>> {
        let layout = self.head_layout(head)?;
        Ok(&mut self.arenas[layout])
    }

    /// The base's arena.
    pub fn base_arena(&mut self) -> &mut Arena<B> {
        &mut self.arenas[BASE]
    }

    /// Bytes of all that a sequence may come to.
    pub fn need(&mut self, sequence: &Sequence) -> Result<u64> {
        let head = sequence.head.as_ref().map(|own| self.head_layout(&own.head)).transpose()?;
        Ok(self.book.need(&[BASE], sequence.limit()) + head.map_or(0, |head| self.book.need(&[head], sequence.limit())))
    }

    /// Promises a sequence all that it may need beside what is known of its beginning. False where it has to wait.
    pub fn admit(&mut self, sequence: &mut Sequence) -> Result<bool> {
        let head = sequence.head.as_ref().map(|own| own.head.clone());
        let head_layout = head.as_ref().map(|head| self.head_layout(head)).transpose()?;
        let key = head.as_ref().map(|head| HeadKey { digest: &head.digest, taps: &head.taps });
        let chain = sequence.shareable_chain().to_vec();
        let known = self.book.known(&chain, key);
        let bytes = |layout: Option<usize>, known: usize| {
            layout.map_or(0, |layout| self.book.need(&[layout], sequence.limit()) - self.book.need(&[layout], known * PAGE))
        };
        let need = bytes(Some(BASE), known.blocks) + bytes(head_layout, known.head_blocks);
        let Some(lease) = self.book.admit(&chain[..known.blocks], need) else { return Ok(false) };
        sequence.lease = Some(lease);
        for hash in &chain[..known.blocks] {
            sequence.table.pages.extend(self.book.page(hash).map(|page| page.number));
        }
        (sequence.shared, sequence.done, sequence.table.length) = (known.blocks, known.blocks * PAGE, known.blocks * PAGE);
        if let Some(own) = &mut sequence.head {
            for hash in &chain[..known.head_blocks] {
                own.table.pages.extend(self.book.head_page(hash, &own.head.digest).map(|page| page.number));
            }
            (own.shared, own.table.length) = (known.head_blocks, known.head_blocks * PAGE);
        }
        Ok(true)
    }

    /// Looks again what is known of a sequence that has not begun: another may have computed it meanwhile.
    pub fn look_again(&mut self, sequence: &mut Sequence) -> Result<()> {
        if sequence.has_begun() || sequence.shareable_chain().len() <= sequence.shared {
            return Ok(());
        }
        self.release(sequence);
        // What was promised has just been given back, so there is room for it.
        self.admit(sequence).map(drop)
    }

    /// Takes the pages that `rows` more positions of the base need, and as many of its head.
    pub fn grow(&mut self, sequence: &mut Sequence, rows: usize) -> Result<()> {
        let Some(mut lease) = sequence.lease.take() else { return Ok(()) };
        let wanted = pages_for(sequence.done + rows);
        while sequence.table.pages.len() < wanted {
            let page = self.book.take(BASE, &mut lease);
            self.apply_freed();
            self.arenas[BASE].take(&self.backend, page.number)?;
            sequence.table.pages.push(page.number);
        }
        if let Some(own) = &mut sequence.head {
            let layout = self.head_layout(&own.head)?;
            while own.table.pages.len() < wanted {
                let page = self.book.take(layout, &mut lease);
                self.apply_freed();
                self.arenas[layout].take(&self.backend, page.number)?;
                own.table.pages.push(page.number);
            }
        }
        sequence.lease = Some(lease);
        Ok(())
    }

    /// Lets a sequence go on from what another has computed of the same prompt: the pages that they do not share are copied.
    pub fn copy_prompt(&mut self, own: &mut Sequence, other: &Sequence) -> Result<()> {
        let known = own.prompt - 1;
        if pages_for(known) > own.shared {
            self.grow(own, known - own.done)?;
            for page in own.shared..pages_for(known) {
                self.arenas[BASE].copy(&self.backend, other.table.pages[page], own.table.pages[page])?;
            }
            if let (Some(own), Some(other)) = (&mut own.head, &other.head) {
                let layout = self.head_layout(&own.head)?;
                for page in own.table.length / PAGE..pages_for(known) {
                    self.arenas[layout].copy(&self.backend, other.table.pages[page], own.table.pages[page])?;
                }
                own.table.length = known;
            }
        }
        (own.done, own.table.length) = (known, known);
        Ok(())
    }

    /// Makes blocks of the pages that are full now.
    pub fn settle(&mut self, sequence: &mut Sequence) -> Result<()> {
        if !sequence.is_shareable() {
            return Ok(());
        }
        sequence.chain.extend(&sequence.tokens);
        let names = sequence.chain.names();
        while sequence.shared < sequence.done / PAGE {
            let place = sequence.shared;
            let page = Page { layout: BASE, number: sequence.table.pages[place] };
            sequence.table.pages[place] = self.book.settle(names[place], page).number;
            sequence.shared += 1;
        }
        if let Some(HeadUse { head, table, shared, .. }) = &mut sequence.head {
            let layout = self.layout(head.runner::<B>().page_layout())?;
            while *shared < table.length / PAGE && *shared < sequence.shared {
                let page = Page { layout, number: table.pages[*shared] };
                table.pages[*shared] = self.book.settle_head(&names[*shared], &head.digest, page).number;
                *shared += 1;
            }
        }
        self.apply_freed();
        Ok(())
    }

    /// Whether these tap rows of a block are kept already.
    pub fn has_taps(&self, hash: &BlockHash, taps: &BTreeSet<Tap>) -> bool {
        self.taps.get(hash).is_some_and(|known| taps.iter().all(|tap| known.contains_key(tap)))
    }

    /// Keeps the tap rows of a block that is in use, if there is room for them.
    pub fn keep_taps(&mut self, hash: &BlockHash, rows: Vec<(Tap, B::Packed)>, bytes: u64) {
        let new: BTreeSet<Tap> = rows.iter().map(|(tap, _)| *tap).collect();
        if self.book.keep_taps(hash, &new, bytes) {
            self.taps.entry(*hash).or_default().extend(rows);
        }
        self.apply_freed();
    }

    /// The rows of a block at a tap.
    pub fn tap_rows(&self, hash: &BlockHash, tap: Tap) -> Option<&B::Packed> {
        self.taps.get(hash)?.get(&tap)
    }

    /// Gives back what no later position of a sequence sees: its own pages, and the use of blocks. What was promised stays so: it is for positions
    /// that are to come.
    pub fn trim(&mut self, sequence: &mut Sequence) {
        let base = out_of_sight(self.window, sequence.table.length);
        let head = sequence.head.as_ref().map_or(usize::MAX, |own| out_of_sight(Some(own.head.shape.window as usize), own.table.length));
        // A block has pages of both.
        let blocks = base.min(head).min(sequence.shared);
        if sequence.gone < blocks {
            self.book.leave(&sequence.chain.names()[sequence.gone..blocks]);
            sequence.gone = blocks;
        }
        if sequence.is_shareable() {
            return;
        }
        self.give(BASE, &sequence.table.pages[sequence.gone.min(base)..base]);
        sequence.gone = sequence.gone.max(base);
        if let Some(own) = &mut sequence.head {
            self.give_of_head(&own.head, &own.table.pages[own.gone..head]);
            own.gone = head;
        }
        self.apply_freed();
    }

    fn give(&mut self, layout: usize, pages: &[u32]) {
        pages.iter().for_each(|number| self.book.give(Page { layout, number: *number }));
    }

    fn give_of_head(&mut self, head: &LoadedHead, pages: &[u32]) {
        // The arena is known: a sequence was admitted to it.
        if let Some(layout) = self.layouts.iter().position(|known| *known == head.runner::<B>().page_layout()) {
            self.give(layout, pages);
        }
    }

    /// Gives back all that a sequence has.
    pub fn release(&mut self, sequence: &mut Sequence) {
        if let Some(own) = &mut sequence.head {
            self.give_of_head(&own.head, &own.table.pages[own.shared.max(own.gone)..]);
            own.table = PageTable::default();
            (own.shared, own.gone) = (0, 0);
        }
        self.give(BASE, &sequence.table.pages[sequence.shared.max(sequence.gone)..]);
        self.book.leave(&sequence.chain.names()[sequence.gone.min(sequence.shared)..sequence.shared]);
        sequence.table = PageTable::default();
        (sequence.shared, sequence.gone) = (0, 0);
        if let Some(mut lease) = sequence.lease.take() {
            self.book.end(&mut lease);
        }
        self.apply_freed();
    }

    fn apply_freed(&mut self) {
        for freed in self.book.freed() {
            match freed {
                Freed::Page(page) => self.arenas[page.layout].give(&self.backend, page.number),
                Freed::Block(hash) => drop(self.taps.remove(&hash)),
            }
        }
    }
}

/// Pages at the beginning of `length` positions that the next position does not see.
fn out_of_sight(window: Option<usize>, length: usize) -> usize {
    first_seen(window, length) / PAGE
}
