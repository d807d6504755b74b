//! A model or heads with pages without end, on any device.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;

use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use carryon_worker::head::{HeadSlot, Runner};
use carryon_worker::kernel::candle::CandleDevice;
use carryon_worker::kernel::{Arena, Backend, Cpu, PageLayout, PageTable, Stored, Threads, pages_for};
use carryon_worker::model::{Capture, Files, Model, Plan, Slot, Tap};

/// Our own kernels on this many threads.
pub fn cpu(threads: usize) -> Cpu {
    Cpu::new(Threads::new(threads))
}

/// candle on its CPU device, or where `CARRYON_CANDLE_DEVICE` says `cuda` (`make gpu-check`) on the first GPU.
pub fn candle() -> CandleDevice {
    match std::env::var("CARRYON_CANDLE_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => CandleDevice::new(candle_core::Device::Cpu),
        Ok("cuda") => CandleDevice::cuda(0).unwrap(),
        Ok(other) => panic!("CARRYON_CANDLE_DEVICE is {other:?}: cpu or cuda"),
    }
}

/// Pages that are handed out one after the other.
pub struct Pages<B: Backend> {
    backend: B,
    arena: Arena<B>,
    next: u32,
}

impl<B: Backend> Pages<B> {
    pub fn new(backend: &B, layout: PageLayout) -> Self {
        Self { backend: backend.clone(), arena: Arena::new(backend, layout, 4096).unwrap(), next: 0 }
    }

    /// Gives a table the pages for `rows` more positions.
    pub fn grow(&mut self, table: &mut PageTable, rows: usize) {
        while table.pages.len() < pages_for(table.length + rows) {
            self.arena.take(&self.backend, self.next).unwrap();
            table.pages.push(self.next);
            self.next += 1;
        }
    }
}

pub struct Engine<B: Backend> {
    pub model: Model<B>,
    pages: Mutex<Pages<B>>,
}

pub fn load(path: &Path, dtype: Dtype, threads: usize) -> Engine<Cpu> {
    Engine::load(path, dtype, cpu(threads))
}

fn captures(taps: &Taps) -> Vec<Capture> {
    Tap::all(taps).map(|tap| Capture { tap, rows: None }).collect()
}

impl<B: Backend> Engine<B> {
    pub fn load<'a>(files: impl Into<Files<'a>>, stored: impl Into<Stored>, backend: B) -> Self {
        let model = Model::load(files, stored, backend).unwrap();
        let pages = Mutex::new(Pages::new(&model.backend, model.page_layout()));
        Self { model, pages }
    }

    pub fn all_taps(&self) -> Taps {
        Taps { layers: (0..=self.model.config.layers.len() as u32).collect(), final_norm: true }
    }

    /// States of sequences that continue their tables: one entry per tap, the rows of all sequences one after the other.
    pub fn states(&self, sequences: &[&[u32]], tables: &mut [PageTable], taps: &Taps) -> Vec<Vec<f32>> {
        let mut pages = self.pages.lock().unwrap();
        sequences.iter().zip(&mut *tables).for_each(|(tokens, table)| pages.grow(table, tokens.len()));
        let mut slots: Vec<_> = sequences.iter().zip(tables).map(|(tokens, kv)| Slot { tokens, kv }).collect();
        let states = self.model.forward(&mut pages.arena, &mut slots, &captures(taps)).unwrap();
        states.iter().map(|rows| self.model.backend.read(rows).unwrap().into_owned()).collect()
    }

    /// States of whole sequences, every layer in pieces of this many rows on pages of one layer; none when `pause` breaks.
    pub fn whole(
        &self,
        sequences: &[&[u32]],
        taps: &Taps,
        rows: usize,
        pause: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Option<Vec<Vec<f32>>> {
        let mut pages = Pages::new(&self.model.backend, self.model.single_pass_layout());
        let mut tables = vec![PageTable::default(); sequences.len()];
        sequences.iter().zip(&mut tables).for_each(|(tokens, table)| pages.grow(table, tokens.len()));
        let mut slots: Vec<_> = sequences.iter().zip(&mut tables).map(|(tokens, kv)| Slot { tokens, kv }).collect();
        let mut found = vec![Vec::new(); taps.count()];
        let mut keep = |index: usize, _: usize, rows: B::Rows| {
            found[index].extend_from_slice(&self.model.backend.read(&rows)?);
            Ok(())
        };
        let flow = self
            .model
            .run(&mut pages.arena, &mut slots, Plan { piece_rows: rows, captures: &captures(taps) }, &mut keep, &mut |_| Ok(pause()))
            .unwrap();
        flow.is_continue().then_some(found)
    }

    /// Logits of final states, rows × V.
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        let (backend, width) = (&self.model.backend, self.model.config.hidden_size);
        let logits = self.model.lm_head().logits(backend, &backend.write(states, width).unwrap()).unwrap();
        backend.read(&logits).unwrap().into_owned()
    }
}

/// Outputs of all rows of sequences that continue their tables: sequence after sequence, each with its own head.
pub fn head_outputs<B: Backend>(pages: &mut Pages<B>, taps: &[&[f32]], sequences: &mut [(&Runner<B>, usize, &mut PageTable)]) -> Vec<f32> {
    let backend = pages.backend.clone();
    let rows: usize = sequences.iter().map(|(_, rows, _)| rows).sum();
    sequences.iter_mut().for_each(|(_, rows, table)| pages.grow(table, *rows));
    let taps: Vec<B::Rows> = taps.iter().map(|tap| backend.write(tap, tap.len() / rows).unwrap()).collect();
    let mut slots: Vec<_> = sequences.iter_mut().map(|(runner, rows, table)| HeadSlot { runner, rows: *rows, table }).collect();
    let outputs: Vec<u32> = (0..rows as u32).collect();
    let delta = Runner::forward(&mut pages.arena, &taps.iter().collect::<Vec<_>>(), &mut slots, &outputs).unwrap();
    backend.read(&delta).unwrap().into_owned()
}

/// Logits of whole sequences of `lengths` rows each.
pub fn class_logits<B: Backend>(backend: &B, runner: &Runner<B>, taps: &[&[f32]], lengths: &[usize]) -> Vec<f32> {
    let (mut pages, mut tables) = (Pages::new(backend, runner.page_layout()), vec![PageTable::default(); lengths.len()]);
    let rows: usize = lengths.iter().sum();
    lengths.iter().zip(&mut tables).for_each(|(rows, table)| pages.grow(table, *rows));
    let taps: Vec<B::Rows> = taps.iter().map(|tap| backend.write(tap, tap.len() / rows).unwrap()).collect();
    let mut slots: Vec<_> = lengths.iter().zip(&mut tables).map(|(rows, table)| HeadSlot { runner, rows: *rows, table }).collect();
    let features = Runner::features(&mut pages.arena, &taps.iter().collect::<Vec<_>>(), &mut slots).unwrap();
    let (width, mut first) = (features.len() / rows, 0);
    let one = |length: &usize| {
        first += length;
        runner.classify(&features[(first - length) * width..first * width]).unwrap()
    };
    lengths.iter().flat_map(one).collect()
}
