//! A part of a file's rows, as `datasets` writes it: `train[:1%]`, `train[100:200]`, `train[-10%:]`. Shares are of the number of
//! rows, rounded to the nearest, as there.

use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Split {
    from: Option<Edge>,
    to: Option<Edge>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Edge {
    Row(i64),
    Percent(i64),
}

impl Split {
    /// `None`: all of it. Errors say what to give.
    pub fn new(given: &str) -> Result<Option<Split>, String> {
        let wrong = || {
            format!(
                "split takes a part of the file, such as train[:1%], train[100:200] or train[-10%:], got {:?}",
                super::excerpt(given)
            )
        };
        let (name, range) = match given.split_once('[') {
            None => (given, None),
            Some((name, range)) => (name, Some(range.strip_suffix(']').ok_or_else(wrong)?)),
        };
        if !["train", "all", ""].contains(&name.trim()) {
            return Err(format!(
                "split: a file is one split, called train: give the file of {:?} as training_file or validation_file",
                super::excerpt(name)
            ));
        }
        let Some(range) = range else {
            return Ok(None);
        };
        let (from, to) = range.split_once(':').ok_or_else(wrong)?;
        let edge = |text: &str| match text.trim() {
            "" => Ok(None),
            text => match text.strip_suffix('%') {
                Some(share) => share
                    .parse()
                    .ok()
                    .filter(|share| (-100..=100).contains(share))
                    .map(Edge::Percent),
                None => text.replace('_', "").parse().ok().map(Edge::Row),
            }
            .ok_or_else(wrong)
            .map(Some),
        };
        Ok(Some(Split {
            from: edge(from)?,
            to: edge(to)?,
        }))
    }

    /// Must the rows be counted first?
    pub fn needs_count(&self) -> bool {
        [self.from, self.to].into_iter().flatten().any(|edge| match edge {
            Edge::Row(row) => row < 0,
            Edge::Percent(_) => true,
        })
    }

    pub fn range(&self, rows: u64) -> Range<u64> {
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        let at = |edge: Option<Edge>, default: i64| {
            let row = match edge {
                None => return default,
                Some(Edge::Row(row)) => row,
                // Halves to the even neighbour, as Python rounds.
                Some(Edge::Percent(share)) => (share as f64 * rows as f64 / 100.0).round_ties_even() as i64,
            };
            if row < 0 {
                (rows + row).max(0)
            } else {
                row.min(rows)
            }
        };
        let from = at(self.from, 0);
        let to = at(self.to, rows).max(from);
        from.cast_unsigned()..to.cast_unsigned()
    }
}
