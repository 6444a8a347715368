//! The driver against a shared library that has the functions of HIP, NVIDIA's driver, their compilers and torch, and
//! writes down what it is given.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

const FAKE: &str = include_str!("fake_driver.c");

/// One fake for a test: what is static in it is that test's.
struct Fake {
    folder: tempfile::TempDir,
}

impl Fake {
    /// `defines`: how it differs from a GPU that works.
    fn new(defines: &[&str]) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("fake.c"), FAKE).unwrap();
        let fake = Fake { folder };
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
            .arg(fake.library())
            .arg(fake.folder.path().join("fake.c"))
            .arg(format!("-DLOG=\"{}\"", fake.log().display()))
            .args(defines.iter().map(|define| format!("-D{define}")))
            .status()
            .unwrap();
        assert!(status.success());
        fake
    }

    fn library(&self) -> PathBuf {
        self.folder.path().join("fake.so")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn open(&self, maker: Maker, device: i64) -> Result<Driver, String> {
        let path = self.library().to_str().unwrap().to_owned();
        Driver::open_with(
            device,
            Libraries {
                maker,
                driver: Library::open(&["no-such-library.so", &path])?,
                torch: Library::open(&[&path])?,
                compiler: vec![path],
            },
        )
    }

    /// What was said to it since the last time.
    fn told(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        std::fs::write(self.log(), "").unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

/// The digest that the fake makes of an image.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum: u32, &byte| {
        sum.wrapping_mul(31).wrapping_add(u32::from(byte))
    })
}

fn looked_up() -> Vec<String> {
    objects::kernels()
        .map(|name| format!("function {name}"))
        .collect()
}

#[test]
fn the_object_of_the_architecture_is_loaded_and_launched_on_atens_stream() {
    for (maker, defines, architecture, lanes) in [
        (
            Maker::Amd,
            vec!["GFX=\"gfx942:sramecc+:xnack-\""],
            "gfx942",
            Lanes::Cdna,
        ),
        (Maker::Amd, vec!["GFX=\"gfx1201\""], "gfx1201", Lanes::Rdna),
        (Maker::Nvidia, vec!["MAJOR=9", "MINOR=0"], "sm_90", Lanes::Nvidia),
        (
            Maker::Nvidia,
            vec!["MAJOR=12", "MINOR=0"],
            "sm_120",
            Lanes::Nvidia,
        ),
    ] {
        let fake = Fake::new(&defines);
        let driver = fake.open(maker, 3).unwrap();
        assert_eq!(driver.lanes(), lanes);
        let report = driver.report();
        assert!(
            report.contains(architecture) && report.ends_with("embedded"),
            "{report}"
        );
        let image = objects::object(architecture).unwrap();
        let mut expected = vec!["device 3".to_owned(), format!("module {}", sum(&image[..64]))];
        expected.extend(looked_up());
        assert_eq!(fake.told(), expected, "{architecture}");

        let values = [0x1122_3344_5566_7788, 7, u64::from(1e-5f32.to_bits())];
        driver.launch("rms_norm", [5, 6, 7], 256, &values).unwrap();
        assert_eq!(
            fake.told(),
            [
                "device 3".to_owned(),
                "launch rms_norm 5 6 7 of 256 1 1, 0 shared, stream 1003, \
                 1122334455667788 7 3727c5ac"
                    .to_owned()
            ]
        );
        let none = driver.launch("no_such_kernel", [1, 1, 1], 64, &[]).unwrap_err();
        assert!(none.contains("no_such_kernel"), "{none}");
        assert!(fake.told().is_empty());
    }
}

#[test]
fn an_architecture_without_an_object_is_compiled_from_the_source() {
    let of_source = {
        let (main, headers) = objects::source();
        let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
        assert!(names.contains(&"gpu.h") && names.contains(&"norm.cu") && !names.contains(&"emu.h"));
        format!("{} {}", sum(main.as_bytes()), names.len())
    };
    for (maker, defines, options) in [
        (
            Maker::Amd,
            vec!["GFX=\"gfx1151\""],
            "--offload-arch=gfx1151 -std=c++20",
        ),
        // A driver that does not take the object.
        (
            Maker::Nvidia,
            vec!["MAJOR=8", "MINOR=9", "REFUSES=1"],
            "--gpu-architecture=sm_89 --std=c++17 --device-as-default-execution-space",
        ),
    ] {
        let fake = Fake::new(&defines);
        let driver = fake.open(maker, 0).unwrap();
        assert!(driver.report().ends_with("compiled at the start"));
        let told = fake.told();
        let compiled = format!("compile {of_source} {options}");
        assert!(told.contains(&compiled), "{compiled}: {told:?}");
        assert!(told.contains(&format!("module {}", sum(&[b'i'; 64]))), "{told:?}");
        driver.launch("rms_norm", [1, 1, 1], 64, &[1, 2, 3]).unwrap();
    }
}

/// By `scripts/gpu-kernels rtc`, which installs the compiler: it needs no GPU.
#[test]
#[ignore = "minutes, and a library of 100 MB: scripts/gpu-kernels rtc"]
fn nvidias_compiler_takes_the_source() {
    let path = std::env::var("GPU_NVRTC").expect("GPU_NVRTC: the path of libnvrtc.so.13");
    let library = Library::open(&[&path]).unwrap();
    let image = runtime::compile(&library, Maker::Nvidia, "sm_90").unwrap();
    assert!(image.starts_with(b"\x7fELF"), "{:?}", &image[..4]);
    for kernel in objects::kernels() {
        let section = format!(".text.{kernel}\0");
        assert!(
            image
                .windows(section.len())
                .any(|window| window == section.as_bytes()),
            "{kernel}"
        );
    }
    let why = runtime::compile(&library, Maker::Nvidia, "sm_1").unwrap_err();
    assert!(why.contains("compiler's error"), "{why}");
}

#[test]
fn what_does_not_work_says_why() {
    let say = |maker, defines: &[&str]| fake_error(maker, defines);
    fn fake_error(maker: Maker, defines: &[&str]) -> String {
        Fake::new(defines)
            .open(maker, 0)
            .err()
            .expect("it cannot be opened")
    }
    let why = say(Maker::Amd, &["GFX=\"gfx1030\"", "CANNOT_COMPILE"]);
    for part in [
        "gfx1030",
        "no object of it",
        "compiler's error 6",
        "kernels.cu:1: error: no matrix cores",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let why = say(Maker::Nvidia, &["MAJOR=7", "MINOR=5", "CANNOT_COMPILE"]);
    assert!(why.contains("sm_75: no object of it"), "{why}");
    let why = say(Maker::Amd, &["GFX=\"gfx942\"", "LACKS=\"rms_norm\""]);
    assert!(
        why.contains("HIP error 500 (named 500) when looking up the kernel rms_norm"),
        "{why}"
    );
    let why = say(Maker::Nvidia, &["MAJOR=9", "MINOR=0", "NO_DEVICE"]);
    assert!(
        why.contains("CUDA error 100 (named 100) when the handle of device 0"),
        "{why}"
    );
    let fake = Fake::new(&["GFX=\"gfx942\"", "LAUNCH_FAILS"]);
    let why = fake
        .open(Maker::Amd, 0)
        .unwrap()
        .launch("rms_norm", [2, 1, 1], 256, &[1])
        .unwrap_err();
    assert!(
        why.contains("HIP error 719 (named 719) when launching the kernel rms_norm, 2 x 1 x 1 blocks of 256"),
        "{why}"
    );
    let none = Library::open(&["no-such-library.so"]).err().unwrap();
    assert!(
        none.contains("no-such-library.so") && !Path::new("no-such-library.so").exists(),
        "{none}"
    );
}
