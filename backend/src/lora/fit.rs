//! What an adapter must fit: the base it answers beside, and how that is held here. All that is needed to pack one on
//! another thread than the one that owns the base.

use std::sync::Arc;

use tandem_kernels::KernelError;
use tandem_kernels::weight::Precision;
use tch::Device;

use super::adapter::Adapter;
use super::params::AdapterParams;
use crate::family::DecoderSpec;
use crate::family::shard::Layout;

#[derive(Clone)]
pub struct Fit {
    /// Of the whole model.
    pub spec: DecoderSpec,
    pub layout: Arc<Layout>,
    pub precision: Precision,
    pub device: Device,
}

impl Fit {
    /// The form that answers, of what this rank holds.
    pub fn pack(&self, params: &AdapterParams) -> Result<Adapter, KernelError> {
        Adapter::new(params, &self.layout, self.precision, self.device)
    }
}
