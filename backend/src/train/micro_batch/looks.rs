//! Several slices, looked at one after the other.

use tandem_kernels::loss::LogProbs;

use crate::lora::adapter::Adapter;
use crate::model::Decoder;
use crate::train::pass::Look;
use crate::train::slice::Slice;

#[derive(Default)]
pub(super) struct Looks {
    pub found: Vec<LogProbs>,
    /// Of the slice behind those.
    look: Option<Look>,
}

impl Looks {
    pub fn advance(&mut self, slices: &[Slice], decoder: &Decoder, adapter: Option<&Adapter>) {
        let slice = &slices[self.found.len()];
        let look = self
            .look
            .take()
            .unwrap_or_else(|| Look::enter(slice, decoder, adapter));
        match look.advance(slice, decoder, adapter) {
            Ok(found) => self.found.push(found),
            Err(look) => self.look = Some(look),
        }
    }

    pub fn is_through(&self, slices: &[Slice]) -> bool {
        self.found.len() == slices.len()
    }
}
