//! What the drivers show of this machine's GPUs, AMD's and NVIDIA's, as gauges read when Prometheus asks. Where there are none, or the
//! driver does not show a number, there is no series. Not here: the reading (backend).

use std::path::PathBuf;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, Opts};
use tandem_backend::{amd, nvidia};

pub struct Gpus {
    /// `/` on a real machine.
    root: PathBuf,
    nvidia: fn() -> Vec<nvidia::Gpu>,
    gauges: Vec<(GaugeVec, Reading)>,
}

/// A GPU of either maker.
struct Gpu {
    index: usize,
    architecture: String,
    memory_bytes: Option<u64>,
    memory_used_bytes: Option<u64>,
    busy_percent: Option<u32>,
    power_watts: Option<f64>,
    temperature_celsius: Option<f64>,
}

type Reading = fn(&Gpu) -> Option<f64>;

/// Of each GPU: its number, in its driver's order, and its architecture (gfx942, sm_90).
const LABELS: [&str; 2] = ["gpu", "architecture"];

const GAUGES: [(&str, &str, Reading); 5] = [
    ("tandem:gpu_memory_bytes", "Memory of the GPU", |gpu| {
        gpu.memory_bytes.map(|bytes| bytes as f64)
    }),
    (
        "tandem:gpu_memory_used_bytes",
        "Memory in use, by whomever",
        |gpu| gpu.memory_used_bytes.map(|bytes| bytes as f64),
    ),
    (
        "tandem:gpu_busy_ratio",
        "Part of the last moment in which the GPU computed; 1 is all",
        |gpu| gpu.busy_percent.map(|percent| f64::from(percent) / 100.0),
    ),
    ("tandem:gpu_power_watts", "Power drawn", |gpu| gpu.power_watts),
    (
        "tandem:gpu_temperature_celsius",
        "Temperature at the hottest place",
        |gpu| gpu.temperature_celsius,
    ),
];

impl Gpus {
    /// `nvidia` asks NVIDIA's driver; AMD's shows files under `root`.
    pub fn new(root: PathBuf, nvidia: fn() -> Vec<nvidia::Gpu>) -> Result<Gpus, prometheus::Error> {
        let gauges = GAUGES
            .iter()
            .map(|&(name, help, reading)| Ok((GaugeVec::new(Opts::new(name, help), &LABELS)?, reading)));
        let gauges = gauges.collect::<Result<_, prometheus::Error>>()?;
        Ok(Gpus { root, nvidia, gauges })
    }

    fn now(&self) -> Vec<Gpu> {
        let amds = amd::gpus(&self.root).into_iter().map(|gpu| Gpu {
            index: gpu.index,
            architecture: gpu.gfx,
            memory_bytes: gpu.vram_total_bytes,
            memory_used_bytes: gpu.vram_used_bytes,
            busy_percent: gpu.busy_percent,
            power_watts: gpu.power_watts,
            temperature_celsius: gpu.temperature_celsius,
        });
        let nvidias = (self.nvidia)().into_iter().map(|gpu| Gpu {
            index: gpu.index,
            architecture: gpu.architecture.unwrap_or_default(),
            memory_bytes: gpu.memory_bytes,
            memory_used_bytes: gpu.memory_used_bytes,
            busy_percent: gpu.busy_percent,
            power_watts: gpu.power_watts,
            temperature_celsius: gpu.temperature_celsius,
        });
        amds.chain(nvidias).collect()
    }
}

impl Collector for Gpus {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges.iter().flat_map(|(gauge, _)| gauge.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let gpus = self.now();
        let mut families = Vec::new();
        for (gauge, reading) in &self.gauges {
            gauge.reset();
            for gpu in &gpus {
                if let Some(value) = reading(gpu) {
                    gauge
                        .with_label_values(&[gpu.index.to_string().as_str(), gpu.architecture.as_str()])
                        .set(value);
                }
            }
            families.extend(gauge.collect());
        }
        families
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use prometheus::{Registry, TextEncoder};

    use super::*;

    #[test]
    fn a_series_for_what_is_shown_and_none_for_the_rest() {
        let root = tempfile::tempdir().unwrap();
        let registry = Registry::new();
        registry
            .register(Box::new(Gpus::new(root.path().into(), Vec::new).unwrap()))
            .unwrap();
        let text = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert_eq!(text(), "");
        for (file, content) in [
            (
                "sys/class/kfd/kfd/topology/nodes/1/properties",
                "gfx_target_version 90402\ndrm_render_minor 128\n",
            ),
            ("sys/class/drm/renderD128/device/mem_info_vram_used", "4096\n"),
            ("sys/class/drm/renderD128/device/gpu_busy_percent", "50\n"),
        ] {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let text = text();
        for line in [
            "tandem:gpu_memory_used_bytes{architecture=\"gfx942\",gpu=\"0\"} 4096",
            "tandem:gpu_busy_ratio{architecture=\"gfx942\",gpu=\"0\"} 0.5",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("gpu_power"), "{text}");
    }

    #[test]
    fn nvidias_gpus_are_told_as_amds_are() {
        let told = || {
            let all = nvidia::Gpu {
                architecture: Some("sm_90".to_owned()),
                memory_bytes: Some(1000),
                memory_used_bytes: Some(100),
                busy_percent: Some(25),
                power_watts: Some(139.5),
                temperature_celsius: Some(41.0),
                ..nvidia::Gpu::default()
            };
            vec![all]
        };
        let root = tempfile::tempdir().unwrap();
        let registry = Registry::new();
        registry
            .register(Box::new(Gpus::new(root.path().into(), told).unwrap()))
            .unwrap();
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for (name, value) in [
            ("memory_bytes", "1000"),
            ("memory_used_bytes", "100"),
            ("busy_ratio", "0.25"),
            ("power_watts", "139.5"),
            ("temperature_celsius", "41"),
        ] {
            let line = format!("tandem:gpu_{name}{{architecture=\"sm_90\",gpu=\"0\"}} {value}");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
}
