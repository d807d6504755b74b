//! What a trainer computes on.

use carryon_crds::pool::Device;

use crate::kernel::candle::CandleDevice;
use crate::train::error::TrainError;
use crate::train::step::device_error;

/// The CUDA device that a trainer should use; none is the CPU.
///
/// # Errors
/// A worker that is not built for it; a device that is not there.
pub(super) fn cuda(device: Device, built_for_cuda: bool) -> Result<Option<CandleDevice>, TrainError> {
    match device {
        Device::Cpu => Ok(None),
        Device::Auto if !built_for_cuda => Ok(None),
        Device::Cuda(_) if !built_for_cuda => Err(TrainError::Configuration(format!(
            "--device is {device}, and this worker is built without CUDA: start the image for CUDA, or say auto or cpu"
        ))),
        Device::Cuda(ordinal) => CandleDevice::cuda(ordinal.into()).map(Some).map_err(device_error),
        // A node without a GPU is no error here.
        Device::Auto => Ok(CandleDevice::cuda(0).inspect_err(|error| tracing::info!("no CUDA device: {error}")).ok()),
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::wire::ExitCode;

    use super::*;

    #[test]
    fn a_worker_without_cuda_trains_on_the_cpu_or_refuses() {
        for device in ["auto", "cpu"] {
            assert!(cuda(device.parse().unwrap(), false).unwrap().is_none(), "{device}");
        }
        let refused = cuda(Device::Cuda(1), false).unwrap_err();
        assert_eq!(refused.exit_code(), ExitCode::Configuration);
        assert!(refused.to_string().starts_with("--device is cuda:1, and this worker is built without CUDA"), "{refused}");
    }
}
