//! The router's own measurements and each replica's numbers, as Prometheus text. Written out by hand: a histogram that
//! was counted elsewhere has no collector. Not here: what vLLM names too.

use std::fmt::{Display, Write};

use tandem_core::histogram::{BOUNDS_US, Counted};
use tandem_router::Part;
use tandem_router::batches::BatchNumbers;
use tandem_router::fleet::{Report, Standing};

/// A number of a replica.
type Of = fn(&Report) -> u64;
/// One of batches.
type OfBatches = fn(&BatchNumbers) -> u64;

/// Name, kind, help, number.
const NUMBERS: [(&str, &str, &str, Of); 5] = [
    (
        "tandem:replica_up",
        "gauge",
        "1 while the replica takes requests",
        |report| u64::from(report.standing == Standing::Up),
    ),
    (
        "tandem:replica_running",
        "gauge",
        "Sequences that run there, of all routers",
        |report| u64::from(report.stats.running),
    ),
    (
        "tandem:replica_waiting",
        "gauge",
        "Sequences that wait there, of all routers",
        |report| u64::from(report.stats.waiting),
    ),
    (
        "tandem:replica_live",
        "gauge",
        "Sequences of this router there",
        |report| u64::from(report.live),
    ),
    (
        "tandem:replica_ejections_total",
        "counter",
        "Times the replica was lost",
        |report| report.ejections,
    ),
];

pub fn write(text: &mut String, model: &str, admissions: &Counted, replicas: &[Report]) {
    let model = label("model_name", model);
    head(
        text,
        "tandem:admission_seconds",
        "histogram",
        "From a call's arrival to its replica's queue",
    );
    histogram(text, "tandem:admission_seconds", &model, admissions);
    for (name, kind, help, of) in NUMBERS {
        head(text, name, kind, help);
        for report in replicas {
            let labels = format!("{model},{}", label("replica", &report.name));
            line(text, name, &labels, of(report));
        }
    }
    let name = "tandem:replica_hop_seconds";
    let help = "Half the round trip of a probe through a replica's session, ten a second; none for one in this process";
    head(text, name, "histogram", help);
    for report in replicas {
        let labels = format!("{model},{}", label("replica", &report.name));
        histogram(text, name, &labels, &report.hops);
    }
}

/// Name, kind, help, number.
const BATCHES: [(&str, &str, &str, OfBatches); 4] = [
    (
        "tandem:batches_queued",
        "gauge",
        "Batches that nobody works on yet, of all routers",
        |batches| batches.queued,
    ),
    (
        "tandem:batches_running",
        "gauge",
        "Batches that this router works on",
        |batches| batches.running,
    ),
    (
        "tandem:batch_lines_completed_total",
        "counter",
        "Lines of batches that were answered",
        |batches| batches.completed_lines,
    ),
    (
        "tandem:batch_lines_failed_total",
        "counter",
        "Lines of batches that were refused or not answered",
        |batches| batches.failed_lines,
    ),
];

pub fn write_batches(text: &mut String, model: &str, batches: &BatchNumbers) {
    let model = label("model_name", model);
    for (name, kind, help, of) in BATCHES {
        head(text, name, kind, help);
        line(text, name, &model, of(batches));
    }
}

/// Each part of the store, whether it answered the last probe.
pub fn write_parts(text: &mut String, model: &str, away: &[Part]) {
    let (name, model) = ("tandem:store_up", label("model_name", model));
    head(text, name, "gauge", "1 while this part of the store answers");
    for part in Part::ALL {
        let labels = format!("{model},{}", label("part", &part.to_string()));
        line(text, name, &labels, u8::from(!away.contains(&part)));
    }
}

fn histogram(text: &mut String, name: &str, labels: &str, counted: &Counted) {
    let Counted { counts, sum_seconds } = counted;
    let mut below = 0;
    let bounds = BOUNDS_US.iter().map(|&us| (us as f64 / 1e6).to_string());
    for (bound, count) in bounds.chain(["+Inf".to_owned()]).zip(counts) {
        below += count;
        let labels = format!("{labels},{}", label("le", &bound));
        line(text, &format!("{name}_bucket"), &labels, below);
    }
    line(text, &format!("{name}_sum"), labels, sum_seconds);
    line(text, &format!("{name}_count"), labels, below);
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}").expect("a String takes all");
}

fn line(text: &mut String, name: &str, labels: &str, value: impl Display) {
    writeln!(text, "{name}{{{labels}}} {value}").expect("a String takes all");
}

fn label(name: &str, value: &str) -> String {
    let value = value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tandem_core::histogram::Histogram;
    use tandem_core::stats::Stats;

    use super::*;

    #[test]
    fn a_histogram_adds_up_and_names_are_quoted() {
        let hops = Histogram::default();
        for us in [20, 20, 5_000_000] {
            hops.observe(Duration::from_micros(us));
        }
        let report = Report {
            name: "a\"b".to_owned(),
            standing: Standing::Draining,
            stats: Stats::default(),
            live: 3,
            ejections: 1,
            hops: hops.counted(),
        };
        let mut text = String::new();
        write(&mut text, "m", &Counted::default(), &[report]);
        write_parts(&mut text, "m", &[Part::Storage]);
        for line in [
            "tandem:replica_up{model_name=\"m\",replica=\"a\\\"b\"} 0",
            "tandem:replica_live{model_name=\"m\",replica=\"a\\\"b\"} 3",
            "tandem:replica_hop_seconds_bucket{model_name=\"m\",replica=\"a\\\"b\",le=\"0.00001\"} 0",
            "tandem:replica_hop_seconds_bucket{model_name=\"m\",replica=\"a\\\"b\",le=\"0.000025\"} 2",
            "tandem:replica_hop_seconds_bucket{model_name=\"m\",replica=\"a\\\"b\",le=\"+Inf\"} 3",
            "tandem:replica_hop_seconds_sum{model_name=\"m\",replica=\"a\\\"b\"} 5.00004",
            "tandem:admission_seconds_count{model_name=\"m\"} 0",
            "tandem:store_up{model_name=\"m\",part=\"database\"} 1",
            "tandem:store_up{model_name=\"m\",part=\"storage\"} 0",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
