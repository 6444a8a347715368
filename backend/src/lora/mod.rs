//! LoRA adapters: their one float32 form (params), the form the kernels read (adapter), and PEFT folders (peft).
//! An adapter never touches a layer: it travels beside the batch.

pub mod adapter;
pub mod dora;
pub mod fit;
pub mod params;
pub mod peft;
