//! Codes of a group become the words of 16 steps of a panel: see [`super::blocks`].

use super::isa::{Isa, isa, vectorised};
use super::operand::bf16_finite;
use super::tile::COLUMNS;
use crate::kernel::Bits;
use crate::kernel::block::BLOCK;

/// Widens the codes of a group; `turned` says that its scales belong to inputs.
pub(super) fn widen(bits: Bits, turned: bool, scales: &[u16], codes: &[u16], words: &mut [u32]) {
    widen_with(isa(), bits, turned, scales, codes, words);
}

fn widen_with(isa: Isa, bits: Bits, turned: bool, scales: &[u16], codes: &[u16], words: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 && !turned {
        assert!(words.len() == BLOCK / 2 * COLUMNS && codes.len() * 2 >= BLOCK / 2 * COLUMNS, "a group has 16 steps");
        match bits {
            // SAFETY: the features were detected, the lengths checked.
            Bits::Q8 => return unsafe { avx512_bf16::widen_q8(&all_widened(scales), codes, words) },
            // SAFETY: as above.
            Bits::Q4 => return unsafe { avx512_bf16::widen_q4(&all_widened(scales), &all_widened(&scales[BLOCK..]), codes, words) },
        }
    }
    let _ = isa;
    match (bits, turned) {
        (Bits::Q8, false) => widen_q8(scales, codes, words),
        (Bits::Q8, true) => widen_turned_q8(scales, codes, words),
        (Bits::Q4, false) => widen_q4(scales, codes, words),
        (Bits::Q4, true) => widen_turned_q4(scales, codes, words),
    }
}

/// The same where the machine itself rounds to bf16: to the nearest, even, as everywhere. It takes numbers below 2⁻¹²⁶ for zero, and there are none:
/// factors are no smaller than 2⁻²⁴.
#[cfg(target_arch = "x86_64")]
mod avx512_bf16 {
    use std::arch::x86_64::*;

    use super::{BLOCK, COLUMNS};

    const LANES: usize = 16;
    /// Codes that are asked for while others are widened: four panels are walked in turns, which no machine foresees.
    const AHEAD: usize = 2048;
    /// Low halves of 16 words, then the high ones, become the words.
    const INTERLEAVED: [u16; 32] = {
        let mut order = [0; 32];
        let mut at = 0;
        while at < 32 {
            order[at] = (at / 2 + at % 2 * LANES) as u16;
            at += 1;
        }
        order
    };

    /// # Safety
    /// The CPU has the features; `word` begins 16 words.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn put(low: __m512, high: __m512, word: *mut u32) {
        // SAFETY: the caller's; both are 512 bits.
        unsafe {
            let order = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
            let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(word.cast(), _mm512_permutexvar_epi16(order, pairs));
        }
    }

    /// # Safety
    /// The CPU has the features; codes and words are those of 16 steps.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn widen_q8(factors: &[f32; BLOCK], codes: &[u16], words: &mut [u32]) {
        for half in (0..COLUMNS).step_by(LANES) {
            // SAFETY: all offsets stay inside the slices: the caller's.
            unsafe {
                let factors = _mm512_loadu_ps(factors.as_ptr().add(half));
                for at in (half..BLOCK / 2 * COLUMNS).step_by(COLUMNS) {
                    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(at + AHEAD).cast());
                    let codes = _mm512_cvtepi16_epi32(_mm256_loadu_si256(codes.as_ptr().add(at).cast()));
                    let (low, high) = (_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(codes)), _mm512_srai_epi32::<8>(codes));
                    let value = |codes| _mm512_mul_ps(factors, _mm512_cvtepi32_ps(codes));
                    put(value(low), value(high), words.as_mut_ptr().add(at));
                }
            }
        }
    }

    /// # Safety
    /// As for [`widen_q8`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn widen_q4(factors: &[f32; BLOCK], least: &[f32; BLOCK], codes: &[u16], words: &mut [u32]) {
        let bytes = codes.as_ptr().cast::<u8>();
        for half in (0..COLUMNS).step_by(LANES) {
            // SAFETY: all offsets stay inside the slices: the caller's.
            unsafe {
                let (factors, least) = (_mm512_loadu_ps(factors.as_ptr().add(half)), _mm512_loadu_ps(least.as_ptr().add(half)));
                for at in (half..BLOCK / 2 * COLUMNS).step_by(COLUMNS) {
                    _mm_prefetch::<_MM_HINT_T0>(bytes.wrapping_add(at + 2 * AHEAD).cast());
                    let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.add(at).cast()));
                    let (low, high) = (_mm512_and_si512(codes, _mm512_set1_epi32(0xf)), _mm512_srli_epi32::<4>(codes));
                    // Not fused, as elsewhere.
                    let value = |codes| _mm512_add_ps(_mm512_mul_ps(factors, _mm512_cvtepi32_ps(codes)), least);
                    put(value(low), value(high), words.as_mut_ptr().add(at));
                }
            }
        }
    }
}

/// The value of finite f16 bits: their exponent is 112 too low for an f32.
#[inline(always)]
pub(super) fn widened(half: u16) -> f32 {
    const TWO_TO_112: f32 = f32::from_bits((112 + 127) << 23);
    let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * TWO_TO_112;
    f32::from_bits(magnitude.to_bits() | (u32::from(half & 0x8000) << 16))
}

#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    bf16_finite(low) | (bf16_finite(high) << 16)
}

#[inline(always)]
fn all_widened(halves: &[u16]) -> [f32; BLOCK] {
    std::array::from_fn(|at| widened(halves[at]))
}

vectorised! {
    fn widen_q8(scales: &[u16], codes: &[u16], words: &mut [u32]) {
        let factors = all_widened(scales);
        for (codes, words) in codes.as_chunks::<COLUMNS>().0.iter().zip(words.as_chunks_mut::<COLUMNS>().0) {
            for (column, word) in words.iter_mut().enumerate() {
                let (low, high) = (codes[column] as i8, (codes[column] >> 8) as i8);
                *word = pair(factors[column] * f32::from(low), factors[column] * f32::from(high));
            }
        }
    }
}

vectorised! {
    fn widen_turned_q8(scales: &[u16], codes: &[u16], words: &mut [u32]) {
        let factors = all_widened(scales);
        for (step, (codes, words)) in codes.as_chunks::<COLUMNS>().0.iter().zip(words.as_chunks_mut::<COLUMNS>().0).enumerate() {
            let (first, second) = (factors[2 * step], factors[2 * step + 1]);
            for (code, word) in codes.iter().zip(words) {
                *word = pair(first * f32::from(*code as i8), second * f32::from((code >> 8) as i8));
            }
        }
    }
}

vectorised! {
    fn widen_q4(scales: &[u16], codes: &[u16], words: &mut [u32]) {
        let (factors, least) = (all_widened(scales), all_widened(&scales[BLOCK..]));
        let codes: &[u8] = bytemuck::cast_slice(codes);
        for (codes, words) in codes.as_chunks::<COLUMNS>().0.iter().zip(words.as_chunks_mut::<COLUMNS>().0) {
            for (column, word) in words.iter_mut().enumerate() {
                let value = |code: u8| factors[column] * f32::from(code) + least[column];
                *word = pair(value(codes[column] & 0xf), value(codes[column] >> 4));
            }
        }
    }
}

vectorised! {
    fn widen_turned_q4(scales: &[u16], codes: &[u16], words: &mut [u32]) {
        let (factors, least) = (all_widened(scales), all_widened(&scales[BLOCK..]));
        let codes: &[u8] = bytemuck::cast_slice(codes);
        for (step, (codes, words)) in codes.as_chunks::<COLUMNS>().0.iter().zip(words.as_chunks_mut::<COLUMNS>().0).enumerate() {
            let value = |input: usize, code: u8| factors[input] * f32::from(code) + least[input];
            for (code, word) in codes.iter().zip(words) {
                *word = pair(value(2 * step, code & 0xf), value(2 * step + 1, code >> 4));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn halves_are_widened_exactly() {
        for bits in (0..=u16::MAX).filter(|bits| f16::from_bits(*bits).is_finite()) {
            assert_eq!(widened(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits());
        }
    }

    #[test]
    fn every_instruction_set_widens_to_the_same_words() {
        let random =
            |count: usize, seed: u32| (0..count as u32).map(move |at| (at.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u16);
        // Factors and least values from the smallest to large ones, none of them infinite.
        let scales: Vec<u16> = random(2 * BLOCK, 5).map(|bits| bits & 0xbbff).collect();
        for (bits, codes) in [(Bits::Q8, random(BLOCK / 2 * COLUMNS, 9)), (Bits::Q4, random(BLOCK / 4 * COLUMNS, 11))] {
            let codes: Vec<u16> = codes.collect();
            for turned in [false, true] {
                let [mut portable, mut own] = [vec![0; BLOCK / 2 * COLUMNS], vec![1; BLOCK / 2 * COLUMNS]];
                widen_with(Isa::Portable, bits, turned, &scales, &codes, &mut portable);
                widen_with(isa(), bits, turned, &scales, &codes, &mut own);
                assert_eq!(portable, own, "{bits:?}, turned {turned}");
            }
        }
    }
}
