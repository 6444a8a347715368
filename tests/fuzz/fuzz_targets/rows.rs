#![no_main]

// Who reads Parquet panics over some damaged files, and that is caught: only what gets out counts.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| tandem_fuzz::rows(bytes));
