//! `tandem doctor`: what this machine offers. Leaves nothing behind. Not here: the detection (backend).

pub fn report() -> String {
    format!(
        "{:<22} {}\n{}",
        "tandem",
        env!("CARGO_PKG_VERSION"),
        tandem_backend::words::report()
    )
}
