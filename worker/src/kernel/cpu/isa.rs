//! Which instructions this machine has, asked once.

use std::sync::OnceLock;

use carryon_crds::pool::Dtype;

/// Vector instructions, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
}

/// The best instructions this machine has.
pub(crate) fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512, avx512 && is_x86_feature_detected!("avx512bf16")) {
        (_, _, true) => Isa::Avx512Bf16,
        (_, true, _) => Isa::Avx512,
        (true, _, _) => Isa::Avx2,
        _ => Isa::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// What rounds on this machine when it multiplies in `dtype`: machines that say the same compute the same bits.
pub fn name(dtype: Dtype) -> &'static str {
    rounding(isa(), dtype)
}

/// All instruction sets but one run the same chain of fused multiply-adds.
pub(super) fn rounding(isa: Isa, dtype: Dtype) -> &'static str {
    match (dtype, isa) {
        (Dtype::Bfloat16, Isa::Avx512Bf16) => "avx512_bf16",
        (Dtype::Bfloat16, _) => "fma_bf16",
        (Dtype::Float32, _) => "fma_f32",
    }
}

/// Compiles a function once per instruction set and calls the best one. The body is plain code over slices that the compiler turns into vector
/// instructions; multiply-adds are written `mul_add`, so all versions give the same bits.
macro_rules! vectorised {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        #[inline]
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                match $crate::kernel::cpu::isa::isa() {
                    // SAFETY: the features were detected.
                    $crate::kernel::cpu::isa::Isa::Avx512 | $crate::kernel::cpu::isa::Isa::Avx512Bf16 => return unsafe { avx512($($argument),*) },
                    // SAFETY: the features were detected.
                    $crate::kernel::cpu::isa::Isa::Avx2 => return unsafe { avx2($($argument),*) },
                    $crate::kernel::cpu::isa::Isa::Portable => {}
                }
            }
            body($($argument),*)
        }
    };
}
pub(crate) use vectorised;
