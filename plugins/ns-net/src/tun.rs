//! Devices whose other end is a descriptor: tun and tap, linux/if_tun.h.

use crate::record::stasis::ns_net::v1::Device;
use stasis_plugin_api::{HookError, Result};

/// Makes the device.
pub(crate) fn make(device: &Device) -> Result<()> {
    Err(HookError::invalid(format!("tun device {}", device.name)))
}
