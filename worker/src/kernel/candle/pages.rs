//! Pages as rows of two tensors a layer.

use candle_core::{Device, Tensor};

use super::places::Places;
use super::{Candle, number_type, scatter};
use crate::kernel::{PAGE, PageLayout, Span};

/// An arena that grows by a quarter when a page beyond its end is taken, and never shrinks. Position `i` of page `p` is row `32 p + i`.
pub struct Pages {
    layout: PageLayout,
    device: Device,
    /// Pages at most.
    count: usize,
    /// Pages that there is memory for.
    ready: usize,
    /// Keys of each layer, and values that keys do not hold, positions × heads · head_dim.
    layers: Vec<Vec<Tensor>>,
}

impl Pages {
    pub(super) fn new(layout: PageLayout, count: usize, device: &Device) -> Self {
        Self { layout, device: device.clone(), count, ready: 0, layers: Vec::new() }
    }

    pub(super) fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Sees to it that there is memory for `page`, one layer after the other: meanwhile no more than one layer is there twice.
    pub(super) fn reach(&mut self, page: usize) -> Candle<()> {
        if page < self.ready {
            return Ok(());
        }
        let ready = (page + 1).max(self.ready + self.ready / 4).min(self.count.max(page + 1));
        let (rows, width) = ((ready - self.ready) * PAGE, self.layout.heads * self.layout.head_dim);
        let empty = || Tensor::zeros((rows, width), number_type(self.layout.dtype), &self.device);
        for layer in 0..self.layout.layers {
            match self.layers.get_mut(layer) {
                Some(known) => *known = known.iter().map(|known| Tensor::cat(&[known, &empty()?], 0)).collect::<Candle<_>>()?,
                None => self.layers.push((0..self.layout.width() / width).map(|_| empty()).collect::<Candle<_>>()?),
            }
        }
        self.ready = ready;
        Ok(())
    }

    pub(super) fn copy(&self, from: usize, to: usize) -> Candle<()> {
        for tensor in self.layers.iter().flatten() {
            tensor.slice_set(&tensor.narrow(0, from * PAGE, PAGE)?.copy()?, 0, to * PAGE)?;
        }
        Ok(())
    }

    /// Writes rows `[keys | values]`, and clears what has to be.
    pub(super) fn append(&self, layer: usize, rows: &Tensor, places: &Places) -> Candle<()> {
        for (part, target) in self.layers[layer].iter().enumerate() {
            let width = target.dims()[1];
            let values = rows.narrow(1, part * width, width)?.to_dtype(target.dtype())?.contiguous()?;
            let values = match places.cleared {
                0 => values,
                zeros => Tensor::cat(&[&values, &Tensor::zeros((zeros, width), values.dtype(), &self.device)?], 0)?,
            };
            scatter(target, &places.written, &values)?;
        }
        Ok(())
    }

    /// Keys and values of a layer at these rows, rows × heads × head_dim and value_dim.
    pub(super) fn gather(&self, layer: usize, rows: &Tensor) -> Candle<[Tensor; 2]> {
        let PageLayout { heads, head_dim, .. } = self.layout;
        let at = |tensor: &Tensor| tensor.index_select(rows, 0)?.reshape((rows.elem_count(), heads, head_dim));
        let keys = at(&self.layers[layer][0])?;
        let values = match self.layout.latent {
            Some(value_dim) => keys.narrow(2, head_dim - value_dim, value_dim)?,
            None => at(&self.layers[layer][1])?,
        };
        Ok([keys, values])
    }
}

/// The row of a position.
pub fn row_of(span: &Span<'_>, position: usize) -> u32 {
    span.pages[position / PAGE] * PAGE as u32 + (position % PAGE) as u32
}
