//! What the driver shows of this machine's AMD GPUs, as gauges read when Prometheus asks. Where there are none, or the
//! driver does not show a number, there is no series. Not here: the reading (backend).

use std::path::PathBuf;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, Opts};
use tandem_backend::amd::{self, Gpu};

pub struct Gpus {
    /// `/` on a real machine.
    root: PathBuf,
    gauges: Vec<(GaugeVec, Reading)>,
}

type Reading = fn(&Gpu) -> Option<f64>;

/// Of each GPU: its number, in the driver's order, and its architecture.
const LABELS: [&str; 2] = ["gpu", "gfx"];

const GAUGES: [(&str, &str, Reading); 5] = [
    ("tandem:gpu_memory_bytes", "Memory of the GPU", |gpu| {
        gpu.vram_total_bytes.map(|bytes| bytes as f64)
    }),
    (
        "tandem:gpu_memory_used_bytes",
        "Memory in use, by whomever",
        |gpu| gpu.vram_used_bytes.map(|bytes| bytes as f64),
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
    pub fn new(root: PathBuf) -> Result<Gpus, prometheus::Error> {
        let gauges = GAUGES
            .iter()
            .map(|&(name, help, reading)| Ok((GaugeVec::new(Opts::new(name, help), &LABELS)?, reading)));
        let gauges = gauges.collect::<Result<_, prometheus::Error>>()?;
        Ok(Gpus { root, gauges })
    }
}

impl Collector for Gpus {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges.iter().flat_map(|(gauge, _)| gauge.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let gpus = amd::gpus(&self.root);
        let mut families = Vec::new();
        for (gauge, reading) in &self.gauges {
            gauge.reset();
            for gpu in &gpus {
                if let Some(value) = reading(gpu) {
                    gauge
                        .with_label_values(&[gpu.index.to_string().as_str(), gpu.gfx.as_str()])
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
            .register(Box::new(Gpus::new(root.path().into()).unwrap()))
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
            "tandem:gpu_memory_used_bytes{gfx=\"gfx942\",gpu=\"0\"} 4096",
            "tandem:gpu_busy_ratio{gfx=\"gfx942\",gpu=\"0\"} 0.5",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("gpu_power"), "{text}");
    }
}
