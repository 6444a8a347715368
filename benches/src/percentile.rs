//! Order statistics of a few thousand measurements.

/// The `q`-th percentile (0..=100), linear between neighbours as numpy's default; `None` of nothing.
pub fn percentile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (sorted.len().checked_sub(1)?) as f64 * q / 100.0;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(low + (high - low) * place.fract())
}

pub fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 50.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        for (values, q, expected) in [
            (&[][..], 50.0, None),
            (&[3.0], 99.0, Some(3.0)),
            (&[4.0, 1.0, 3.0, 2.0], 50.0, Some(2.5)),
            (&[4.0, 1.0, 3.0, 2.0], 100.0, Some(4.0)),
            (&[0.0, 10.0], 95.0, Some(9.5)),
        ] {
            assert_eq!(percentile(values, q), expected, "{values:?} {q}");
        }
    }
}
