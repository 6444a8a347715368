//! Case files of `kernels/gpu` run on a device, by the driver that serves. The last line is JSON: how many, and which are
//! wrong.
//!
//!   target/release/gpu_cases --device cuda:0 FOLDER_OR_FILE...

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::json;
use tandem_backend::words;
use tandem_kernels::gpu::cases;

#[derive(Parser)]
struct Options {
    /// cuda:N, or emu:LANES
    #[arg(long)]
    device: String,
    /// As `scripts/gpu-kernels cases` writes them, in the lanes of the device
    #[arg(required = true)]
    cases: Vec<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let device = words::device(&options.device)?;
    let mut files = vec![];
    for path in options.cases {
        match path.is_dir() {
            true => {
                let entries = std::fs::read_dir(&path)?.collect::<Result<Vec<_>, _>>()?;
                let found = entries.into_iter().map(|entry| entry.path());
                files.extend(found.filter(|file| file.extension().is_some_and(|end| end == "case")));
            }
            false => files.push(path),
        }
    }
    ensure!(!files.is_empty(), "no cases");
    files.sort();
    let mut wrong = vec![];
    for file in &files {
        let case = std::fs::read(file).with_context(|| file.display().to_string())?;
        let cases::Outcome {
            kernel,
            numbers,
            other_bits,
            worst,
            wrong: is_wrong,
        } = cases::check(&case, device).map_err(|why| anyhow::anyhow!("{}: {why}", file.display()))?;
        let mark = if is_wrong { "  <-- wrong" } else { "" };
        println!("{kernel:28} {numbers:9} numbers, {other_bits:7} of other bits, off by {worst:.1e}{mark}");
        wrong.extend(is_wrong.then_some(kernel));
    }
    println!(
        "{}",
        json!({"device": options.device, "cases": files.len(), "wrong": wrong})
    );
    ensure!(
        wrong.is_empty(),
        "{} of {} kernels are wrong",
        wrong.len(),
        files.len()
    );
    Ok(())
}
