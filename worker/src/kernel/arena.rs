//! Keys and values of sequences: an arena of pages, and what says which of them are whose.

use super::{Backend, PAGE, PageLayout, Result};

/// Where the keys and values of one sequence lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageTable {
    /// The page of each [`PAGE`] positions from the first on.
    pub pages: Vec<u32>,
    /// Positions held: the next token's position.
    pub length: usize,
}

/// Pages that `positions` positions take.
pub fn pages_for(positions: usize) -> usize {
    positions.div_ceil(PAGE)
}

/// The pages of many sequences on a device. Who hands out page numbers sees to it that no two sequences write the same page.
pub struct Arena<B: Backend> {
    pages: B::Pages,
    layout: PageLayout,
}

impl<B: Backend> Arena<B> {
    /// Room for `count` pages.
    ///
    /// # Errors
    /// The device has no memory for them.
    pub fn new(backend: &B, layout: PageLayout, count: usize) -> Result<Self> {
        Ok(Self { pages: backend.pages(layout, count)?, layout })
    }

    /// What a page holds.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Makes a page ready for positions.
    ///
    /// # Errors
    /// The device failed.
    pub fn take(&mut self, backend: &B, page: u32) -> Result<()> {
        backend.take_page(&mut self.pages, page)
    }

    /// Copies a page to one that was taken.
    ///
    /// # Errors
    /// The device failed.
    pub fn copy(&mut self, backend: &B, from: u32, to: u32) -> Result<()> {
        backend.copy_page(&mut self.pages, from, to)
    }

    /// Gives a page back.
    pub fn give(&mut self, backend: &B, page: u32) {
        backend.give_page(&mut self.pages, page);
    }

    /// Writes keys and values of a layer's rows, and lets queries attend to them: [`Backend::append`], then [`Backend::attend`]. An arena of one layer is used by
    /// each layer in its turn, enough for sequences that come in one pass and are not continued.
    ///
    /// # Errors
    /// The device failed.
    pub fn attend(
        &mut self,
        backend: &B,
        layer: usize,
        queries: &B::Rows,
        (keys, column): (&B::Rows, usize),
        places: &B::Places,
        out: &mut B::Packed,
    ) -> Result<()> {
        let layer = layer.min(self.layout.layers - 1);
        backend.append(&mut self.pages, layer, keys, column, places)?;
        backend.attend(&self.pages, layer, queries, places, out)
    }
}
