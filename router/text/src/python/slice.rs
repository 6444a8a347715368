//! Slices that go backwards, as Python takes them: the template language's own panic on what is empty, and take `[3:0:-1]` for
//! `[3::-1]`. Not here: slices that go forwards.

use minijinja::value::{Tuple, Value, ValueKind};
use minijinja::{Error, State};

use super::weight;

/// What is to be sliced instead, and by what: `[value, start, stop, step]`. Whatever goes forwards, or is no slice, stays.
pub fn turned(
    state: &mut State,
    value: Value,
    start: Value,
    stop: Value,
    step: Value,
) -> Result<[Value; 4], Error> {
    let bound = |bound: &Value| match bound.is_none() {
        true => Some(None),
        false => i64::try_from(bound.clone()).ok().map(Some),
    };
    let bounds = (bound(&start), bound(&stop), bound(&step).flatten());
    let (Some(from), Some(to), Some(step_by @ ..0)) = bounds else {
        return Ok([value, start, stop, step]);
    };
    let backwards = |n: usize| backwards(n, from, to, step_by);
    let sliced = if let Some(text) = value.as_str() {
        weight::read(state, text)?;
        let chars: Vec<char> = text.chars().collect();
        Value::from(backwards(chars.len()).map(|i| chars[i]).collect::<String>())
    } else if let Some(bytes) = value.as_bytes() {
        Value::from_bytes(backwards(bytes.len()).map(|i| bytes[i]).collect())
    } else if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        weight::items(&value)?;
        let items: Vec<Value> = value.try_iter()?.collect();
        let sliced: Vec<Value> = backwards(items.len()).map(|i| items[i].clone()).collect();
        match value.is_tuple() {
            true => Value::from(Tuple::from(sliced)),
            false => Value::from(sliced),
        }
    } else {
        return Ok([value, start, stop, step]);
    };
    Ok([sliced, Value::from(()), Value::from(()), Value::from(())])
}

/// The places of `[from:to:step]` in a list of n, step < 0 (Python's `range(*slice(from, to, step).indices(n))`).
fn backwards(n: usize, from: Option<i64>, to: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let n = n as i64;
    let place = |bound: i64| match bound < 0 {
        true => bound.saturating_add(n).max(-1),
        false => bound.min(n - 1),
    };
    let (first, end) = (from.map_or(n - 1, place), to.map_or(-1, place));
    let next = move |&place: &i64| place.checked_add(step);
    std::iter::successors(Some(first), next)
        .take_while(move |&place| place > end)
        .map(|place| place as usize)
}
