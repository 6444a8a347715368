//! Names of the models that jobs make.

use crate::Config;
use crate::api::JobRequest;
use crate::time::calendar;

/// In order of preference; the last is unique to the job.
pub(crate) fn candidates(request: &JobRequest, config: &Config, id: &str, created_at: i64) -> Vec<String> {
    let Config {
        served_model_name: base,
        organization,
        ..
    } = config;
    let suffix = hyphened(request.suffix.as_deref().unwrap_or_default());
    let random = id.rsplit('-').next().expect("rsplit gives at least one part");
    let short: String = random.chars().take(8).collect();
    if !request.legacy {
        return vec![
            format!("ft:{base}:{organization}:{suffix}:{short}"),
            format!("ft:{base}:{organization}:{suffix}:{random}"),
        ];
    }
    let suffix = if suffix.is_empty() {
        String::new()
    } else {
        format!(":{suffix}")
    };
    let dated = format!("{base}:ft-{organization}{suffix}-{}", date(created_at));
    vec![dated.clone(), format!("{dated}-{random}")]
}

/// Words of a suffix, one name: "custom model name" is custom-model-name, as at OpenAI.
pub(crate) fn hyphened(suffix: &str) -> String {
    suffix.split_whitespace().collect::<Vec<_>>().join("-")
}

/// `2026-11-21-01-44-20`, UTC.
fn date(unix_s: i64) -> String {
    let [year, month, day, hour, minute, second] = calendar(unix_s);
    format!("{year:04}-{month:02}-{day:02}-{hour:02}-{minute:02}-{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let cases = [
            (0, "1970-01-01-00-00-00"),
            (951_782_399, "2000-02-28-23-59-59"),
            (951_782_400, "2000-02-29-00-00-00"),
            (1_709_251_200, "2024-03-01-00-00-00"),
            (1_795_225_460, "2026-11-21-01-44-20"),
        ];
        for (unix_s, expected) in cases {
            assert_eq!(date(unix_s), expected);
        }
    }

    #[test]
    fn names_say_base_organization_and_suffix() {
        let config = Config {
            served_model_name: "m".to_owned(),
            organization: "acme".to_owned(),
            ..Config::default()
        };
        let cases = [
            (None, false, "ft:m:acme::01234567"),
            (Some("x"), false, "ft:m:acme:x:01234567"),
            (None, true, "m:ft-acme-1970-01-01-00-00-00"),
            (Some("x"), true, "m:ft-acme:x-1970-01-01-00-00-00"),
            (
                Some("custom model name"),
                false,
                "ft:m:acme:custom-model-name:01234567",
            ),
            (Some(" a  b "), true, "m:ft-acme:a-b-1970-01-01-00-00-00"),
        ];
        for (suffix, legacy, expected) in cases {
            let request = JobRequest {
                suffix: suffix.map(str::to_owned),
                legacy,
                ..JobRequest::default()
            };
            let names = candidates(&request, &config, "ftjob-0123456789abcdefghijABCD", 0);
            assert_eq!(names[0], expected);
            assert!(names[1].ends_with("0123456789abcdefghijABCD"));
        }
    }
}
