//! Case files (`kernels/gpu/cases/README.md`): a kernel's launch with all that it reads and what it left, run again on a
//! device. They come from the tests of `kernels/gpu/tests`, so a GPU is held against what these judged.

use tch::{Device, Tensor};

use super::{Arg, emulating, on, report};

/// What a launch gave, beside what its case says.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub kernel: String,
    /// Of the buffers that the kernel is given, float32, bfloat16 or else bytes.
    pub numbers: usize,
    /// How many have other bits.
    pub other_bits: usize,
    /// The largest difference of two float32 or bfloat16, as a part of the buffer's largest number; infinite where one is a
    /// number and the other is none.
    pub worst: f64,
    /// More than [`Outcome::worst`] may be, or bytes that differ.
    pub wrong: bool,
}

/// A part of the largest number by which another order of sums, or another exp2, may move a result of this kernel.
fn bar(kernel: &str, kind: u8) -> f64 {
    match kind {
        // One unit in the last place, where what is rounded differs in its own last bits.
        b'h' => 1.0 / 128.0,
        // Probabilities are rounded to bfloat16 on their way.
        _ if kernel.starts_with("attention_") => 3e-3,
        _ => 1e-5,
    }
}

/// Runs a case on a device with kernels of ours. On the emulated device, whose lanes must be those the case was written in,
/// another bit is wrong.
///
/// # Errors
/// What is no case, and a device without kernels.
///
/// # Panics
/// As a launch does.
pub fn check(case: &[u8], device: Device) -> Result<Outcome, String> {
    let case = Case::parse(case).ok_or("not a case file")?;
    let gpu = on(device).ok_or_else(|| match device {
        Device::Cuda(index) => report(index).err().unwrap_or_default(),
        _ => "kernels run on GPUs and on the emulated device".to_owned(),
    })?;
    let upload = |bytes: &[u8]| Tensor::from_slice(bytes).to_device(device);
    let pointed_to: Vec<Tensor> = case.addresses.iter().map(|address| upload(address.to)).collect();
    let buffers: Vec<Option<Tensor>> = (0..case.args.len())
        .map(|i| {
            if case.kinds[i] == 0 || case.args[i].is_empty() {
                return None;
            }
            let mut bytes = case.args[i].to_vec();
            for (address, to) in case.addresses.iter().zip(&pointed_to) {
                if address.argument == i {
                    bytes[address.offset..][..8].copy_from_slice(&(to.data_ptr() as u64).to_le_bytes());
                }
            }
            Some(upload(&bytes))
        })
        .collect();
    let args: Vec<Arg> = (0..case.args.len())
        .map(|i| match (&buffers[i], case.kinds[i]) {
            (Some(buffer), _) => Arg::Tensor(buffer),
            (None, 0) => {
                let mut value = [0; 8];
                value[..case.args[i].len()].copy_from_slice(case.args[i]);
                Arg::Long(i64::from_le_bytes(value))
            }
            _ => Arg::Null,
        })
        .collect();
    let [x, y, z, threads] = case.grid;
    gpu.launch(case.kernel, [x, y, z].map(|n| n as usize), threads, &args);

    let mut outcome = Outcome {
        kernel: case.kernel.to_owned(),
        numbers: 0,
        other_bits: 0,
        worst: 0.0,
        wrong: false,
    };
    for (i, want) in case.pointers().zip(&case.results) {
        let Some(buffer) = &buffers[i] else { continue };
        let mut got = Vec::<u8>::try_from(buffer.to_device(Device::Cpu)).map_err(|why| why.to_string())?;
        for address in case.addresses.iter().filter(|address| address.argument == i) {
            got[address.offset..][..8].fill(0);
        }
        outcome.compare(&got, want, case.kinds[i], emulating().is_some());
    }
    Ok(outcome)
}

impl Outcome {
    fn compare(&mut self, got: &[u8], want: &[u8], kind: u8, exact: bool) {
        let (size, number): (usize, fn(&[u8]) -> f64) = match kind {
            b'f' => (4, |b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            b'h' => (2, |b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()),
            _ => (1, |b| f64::from(b[0])),
        };
        let largest = want
            .chunks_exact(size)
            .map(number)
            .filter(|x| x.is_finite())
            .fold(0.0, |a: f64, x| a.max(x.abs()));
        let (mut other_bits, mut worst) = (0, 0.0_f64);
        for (got, want) in got.chunks_exact(size).zip(want.chunks_exact(size)) {
            self.numbers += 1;
            if got == want {
                continue;
            }
            other_bits += 1;
            let off = (number(got) - number(want)).abs() / largest;
            worst = worst.max(if off.is_finite() { off } else { f64::INFINITY });
        }
        self.other_bits += other_bits;
        let bytes = !matches!(kind, b'f' | b'h');
        // A code of int8 keys may be the next one.
        let codes = bytes && self.kernel.ends_with("_int8") && other_bits * 200 <= got.len();
        self.wrong |= match bytes || exact {
            true => other_bits > 0 && (exact || !codes),
            false => worst > bar(&self.kernel, kind),
        };
        if !bytes {
            self.worst = self.worst.max(worst);
        }
    }
}

struct Address<'a> {
    argument: usize,
    offset: usize,
    to: &'a [u8],
}

struct Case<'a> {
    kernel: &'a str,
    grid: [u32; 4],
    args: Vec<&'a [u8]>,
    /// Of each argument: 0 a value, else what it points to.
    kinds: &'a [u8],
    /// Of each pointer.
    results: Vec<&'a [u8]>,
    addresses: Vec<Address<'a>>,
}

impl<'a> Case<'a> {
    /// `None` where the file is not one.
    fn parse(mut file: &'a [u8]) -> Option<Case<'a>> {
        let mut arrays = vec![];
        while !file.is_empty() {
            let (size, rest) = file.split_first_chunk::<8>()?;
            let size = usize::try_from(u64::from_le_bytes(*size)).ok()?;
            arrays.push(rest.get(..size)?);
            file = &rest[size..];
        }
        let kinds = arrays.pop()?;
        let pointers = kinds.iter().filter(|&&kind| kind != 0).count();
        let mut arrays = arrays.into_iter();
        let kernel = std::str::from_utf8(arrays.next()?).ok()?;
        let words = |bytes: &[u8]| -> Vec<u32> {
            let words = bytes.chunks_exact(4);
            words
                .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect()
        };
        let grid = words(arrays.next()?).try_into().ok()?;
        let args: Vec<&[u8]> = arrays.by_ref().take(kinds.len()).collect();
        let results: Vec<&[u8]> = arrays.by_ref().take(pointers).collect();
        let mut addresses = vec![];
        while let Some(place) = arrays.next() {
            let [argument, offset] = words(place)[..] else {
                return None;
            };
            let (argument, offset) = (argument as usize, offset as usize);
            args.get(argument)?.get(offset..offset + 8)?;
            let to = arrays.next()?;
            addresses.push(Address { argument, offset, to });
        }
        let case = Case {
            kernel,
            grid,
            args,
            kinds,
            results,
            addresses,
        };
        let sizes_fit = case
            .kinds
            .iter()
            .zip(&case.args)
            .all(|(&kind, arg)| kind != 0 || arg.len() <= 8);
        let alike = case
            .pointers()
            .zip(&case.results)
            .all(|(i, result)| case.args[i].len() == result.len());
        (case.args.len() == kinds.len() && case.results.len() == pointers && sizes_fit && alike)
            .then_some(case)
    }

    /// The arguments that are pointers.
    fn pointers(&self) -> impl Iterator<Item = usize> {
        self.kinds
            .iter()
            .enumerate()
            .filter(|(_, kind)| **kind != 0)
            .map(|(i, _)| i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Lanes, emulated};

    fn case(kernel: &str, arrays: &[&[u8]]) -> Vec<u8> {
        let mut file = vec![];
        for array in [&[kernel.as_bytes()], arrays].concat() {
            file.extend((array.len() as u64).to_le_bytes());
            file.extend(array);
        }
        file
    }

    fn bytes(numbers: &[f32]) -> Vec<u8> {
        numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    /// x and n of `scale`, which makes 1 and 3 a half of it, and what it is said to have made.
    fn scaled(want: &[f32]) -> Vec<u8> {
        let grid: Vec<u8> = [1_u32, 1, 1, 256].iter().flat_map(|n| n.to_le_bytes()).collect();
        let n = 2_u64.to_le_bytes();
        case(
            "scale",
            &[
                &grid,
                &bytes(&[1.0, 3.0]),
                &n,
                &0.5_f32.to_le_bytes(),
                &bytes(want),
                b"f\0\0",
            ],
        )
    }

    #[test]
    fn a_case_is_run_and_compared() {
        let run = |file: &[u8]| emulated(Lanes::Cdna, || check(file, Device::Cpu));
        let right = run(&scaled(&[0.5, 1.5])).unwrap();
        assert_eq!(
            (
                right.kernel.as_str(),
                right.numbers,
                right.other_bits,
                right.wrong
            ),
            ("scale", 2, 0, false)
        );
        let wrong = run(&scaled(&[0.5, 2.0])).unwrap();
        assert_eq!((wrong.other_bits, wrong.worst, wrong.wrong), (1, 0.25, true));
        let none = run(&scaled(&[0.5, f32::NAN])).unwrap();
        assert!(none.wrong && none.worst.is_infinite());
        for damaged in [&b"no case"[..], &scaled(&[0.5, 1.5])[1..], &scaled(&[0.5])] {
            assert!(run(damaged).is_err());
        }
        let why = check(&scaled(&[0.5, 1.5]), Device::Cpu).unwrap_err();
        assert!(why.contains("emulated device"), "{why}");
    }

    /// What a GPU may do otherwise, and what it may not.
    #[test]
    fn sums_may_be_in_another_order_and_choices_may_not() {
        let compare = |kernel: &str, kind, got: &[f32], want: &[f32]| {
            let mut outcome = Outcome {
                kernel: kernel.to_owned(),
                numbers: 0,
                other_bits: 0,
                worst: 0.0,
                wrong: false,
            };
            outcome.compare(&bytes(got), &bytes(want), kind, false);
            outcome.wrong
        };
        assert!(!compare("rms_norm", b'f', &[1.000001, 4.0], &[1.0, 4.0]));
        assert!(compare("rms_norm", b'f', &[1.0001, 4.0], &[1.0, 4.0]));
        assert!(!compare("attention_16x128", b'f', &[1.0001, 4.0], &[1.0, 4.0]));
        assert!(compare("sample", b'b', &[1.000001, 4.0], &[1.0, 4.0]));
    }

    /// Written by `scripts/gpu-kernels cases`, which compares them.
    #[test]
    fn every_kernel_has_a_case_in_the_lanes_of_each_maker() {
        let digests = include_str!("../../gpu/cases/digests");
        let listed: Vec<&str> = digests
            .lines()
            .filter_map(|line| line.split("  ").nth(1))
            .collect();
        for lanes in 1..=3 {
            for kernel in super::super::objects::kernels() {
                let (first, last) = (format!("{lanes}/"), format!("/{kernel}.case"));
                let found = listed
                    .iter()
                    .any(|file| file.starts_with(&first) && file.ends_with(&last));
                assert!(
                    found,
                    "no case of {kernel} in the lanes {lanes}: scripts/gpu-kernels cases --write"
                );
            }
        }
    }
}
