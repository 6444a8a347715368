//! Moments for people and for other programs.

/// Year, month, day, hour, minute and second, UTC.
pub fn calendar(unix_s: i64) -> [i64; 6] {
    let (days, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms": civil_from_days. Years begin in March.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    [year, month, day, second / 3600, second / 60 % 60, second % 60]
}

/// ISO 8601: `2026-11-21T01:44:20Z`.
pub fn iso(unix_s: i64) -> String {
    let [year, month, day, hour, minute, second] = calendar(unix_s);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
