//! `tandem plot`: curves of runs as an SVG picture, from the metrics.jsonl that each writes. Not here: what a run reports (core).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tandem_core::report::Report;
use tandem_core::suggest::closest;

use crate::cli::Plot;
use crate::exit::WrongSetting;
use crate::train::LINES;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 480.0;
/// Around the curves.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 45.0;
/// Of a line of the legend.
const LINE: f64 = 18.0;
const TICKS: usize = 5;
/// Told apart by most eyes (Okabe and Ito, 2008).
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
];
/// A validation's numbers, as transformers names them.
const EVAL: &str = "eval_";

/// Numbers of one run under one name.
struct Curve {
    label: String,
    /// Step and number.
    points: Vec<(f64, f64)>,
    colour: &'static str,
    /// Of a validation.
    is_dashed: bool,
}

pub fn run(options: &Plot) -> Result<()> {
    let Plot {
        metrics,
        output,
        metric,
    } = options;
    let mut curves = vec![];
    let mut names: Vec<String> = vec![];
    for (path, colour) in metrics.iter().zip(COLOURS.iter().cycle()) {
        let path = file(path);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let reports: Vec<Report> = text.lines().filter_map(Report::of_json).collect();
        names.extend(
            reports
                .iter()
                .flat_map(|report| report.values.iter().map(|(name, _)| name.clone())),
        );
        for name in [metric.clone(), format!("{EVAL}{metric}")] {
            let points = points(&reports, &name);
            if !points.is_empty() {
                curves.push(Curve {
                    label: format!("{}: {name}", run_of(&path)),
                    points,
                    colour,
                    is_dashed: name.starts_with(EVAL),
                });
            }
        }
    }
    if curves.is_empty() {
        names.sort_unstable();
        names.dedup();
        let hint = match closest(metric, names.iter().map(String::as_str)) {
            Some(name) => format!("did you mean {name}?"),
            None => format!("there are {}", names.join(", ")),
        };
        return Err(WrongSetting(format!("--metric {metric}: no file has a number of it: {hint}")).into());
    }
    if output.extension().is_none_or(|ending| ending != "svg") {
        let message = format!(
            "--output {}: curves are drawn as SVG, give a file that ends so; browsers, `rsvg-convert` and `inkscape` make a PNG of one",
            output.display()
        );
        return Err(WrongSetting(message).into());
    }
    std::fs::write(output, svg(&curves, metric)).with_context(|| output.display().to_string())?;
    say!("{}: {} curves", output.display(), curves.len());
    Ok(())
}

/// A run's folder stands for the file in it.
fn file(path: &Path) -> PathBuf {
    match path.is_dir() {
        true => path.join(LINES),
        false => path.to_owned(),
    }
}

/// The folder's name, where the file has the name that all have.
fn run_of(path: &Path) -> String {
    let is_usual = path.file_name().is_some_and(|name| name == LINES);
    let named = if is_usual { path.parent() } else { Some(path) };
    let name = named.and_then(Path::file_name).unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// By step; of a step that was reported twice, the later report.
fn points(reports: &[Report], name: &str) -> Vec<(f64, f64)> {
    let mut points = BTreeMap::new();
    for report in reports {
        let values = report.values.iter().filter(|(other, _)| other == name);
        points.extend(values.map(|(_, value)| (report.step, *value)));
    }
    let points = points.into_iter().filter(|(_, value)| value.is_finite());
    points.map(|(step, value)| (step as f64, value)).collect()
}

fn svg(curves: &[Curve], metric: &str) -> String {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let (steps, values) = (
        ticks(all().map(|(step, _)| *step)),
        ticks(all().map(|(_, value)| *value)),
    );
    let place = |ticks: &[f64], value: f64| {
        let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
        (value - low) / (high - low)
    };
    let bottom = HEIGHT - BOTTOM;
    let x = |step: f64| LEFT + place(&steps, step) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| bottom - place(&values, value) * (bottom - TOP);
    let height = HEIGHT + LINE * curves.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut line = |text: String| writeln!(svg, "{text}").expect("a text takes lines");
    for &tick in &values {
        let at = y(tick);
        line(format!(
            "<path d=\"M{LEFT} {at:.1}H{}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            number(tick)
        ));
    }
    for &tick in &steps {
        line(format!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(tick),
            bottom + 18.0,
            number(tick)
        ));
    }
    line(format!(
        "<text x=\"{LEFT}\" y=\"14\">{}</text><text x=\"{}\" y=\"{}\" text-anchor=\"end\">step</text>",
        escaped(metric),
        WIDTH - RIGHT,
        bottom + 36.0
    ));
    for (number, curve) in curves.iter().enumerate() {
        let Curve {
            label,
            points,
            colour,
            is_dashed,
        } = curve;
        let dashes = if *is_dashed {
            " stroke-dasharray=\"6 4\""
        } else {
            ""
        };
        let stroke = format!("fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"{dashes}");
        let points: Vec<String> = points
            .iter()
            .map(|&(step, value)| format!("{:.1},{:.1}", x(step), y(value)))
            .collect();
        line(format!("<polyline points=\"{}\" {stroke}/>", points.join(" ")));
        let at = HEIGHT + LINE * number as f64;
        line(format!(
            "<path d=\"M{LEFT} {at}h30\" {stroke}/><text x=\"{}\" y=\"{}\">{}</text>",
            LEFT + 38.0,
            at + 4.0,
            escaped(label)
        ));
    }
    svg + "</svg>\n"
}

/// Round numbers, a few and evenly apart, the first and the last of which enclose all.
fn ticks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    let span = if high > low {
        high - low
    } else {
        low.abs().max(1.0)
    };
    let rough = span / TICKS as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let round = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let every = round.into_iter().find(|every| *every >= rough).unwrap_or(rough);
    let first = (low / every).floor();
    let last = (high / every).ceil().max(first + 1.0);
    (0..=(last - first) as u32)
        .map(|n| (first + f64::from(n)) * every)
        .collect()
}

/// Without the noise of binary fractions.
fn number(value: f64) -> String {
    let text = match value != 0.0 && value.abs() < 1e-3 {
        true => return format!("{value:.0e}"),
        false => format!("{value:.4}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_enclose_all() {
        for (values, expected) in [
            (&[0.0, 10.0][..], &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0][..]),
            (&[1.0, 60.0], &[0.0, 20.0, 40.0, 60.0]),
            (&[2.31, 0.42], &[0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
            (&[3.0], &[3.0, 4.0]),
            (&[-0.5, 0.5], &[-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6]),
        ] {
            let ticks = ticks(values.iter().copied());
            let close = ticks.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9);
            assert!(close && ticks.len() == expected.len(), "{values:?}: {ticks:?}");
        }
        assert_eq!(
            [0.0, 0.2 + 0.1, 1e-5, 40.0].map(number),
            ["0", "0.3", "1e-5", "40"]
        );
    }

    #[test]
    fn runs_become_curves() {
        let folder = tempfile::tempdir().unwrap();
        let run_folder = folder.path().join("a<b");
        std::fs::create_dir(&run_folder).unwrap();
        let lines = "{\"step\":1,\"loss\":3.0}\n{\"step\":2,\"loss\":9.0}\n{\"step\":2,\"loss\":2.0}\n{\"step\":2,\"eval_loss\":2.5}\n";
        std::fs::write(run_folder.join(LINES), lines).unwrap();
        let output = folder.path().join("x.svg");
        let plot = |metric: &str| {
            run(&Plot {
                metrics: vec![run_folder.clone()],
                output: output.clone(),
                metric: metric.to_owned(),
            })
        };
        plot("loss").unwrap();
        let svg = std::fs::read_to_string(&output).unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("a&lt;b: eval_loss"), "{svg}");
        // Step 1 at the left and above step 2, which was 2.0 at last.
        assert!(svg.contains("points=\"70.0,20.0 780.0,435.0\""), "{svg}");
        let message = plot("los").unwrap_err().to_string();
        assert!(message.contains("did you mean loss?"), "{message}");
    }
}
