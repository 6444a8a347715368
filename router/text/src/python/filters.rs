//! The template language's own filters and tests, weighed: what they are given before, what they made after. Those that can
//! multiply a text are looked at before. Not here: filters that Python has otherwise (`python`).

use minijinja::filters as own;
use minijinja::value::{Kwargs, Rest, Value, ValueOrKwargs};
use minijinja::{Environment, Error, State, tests};

use super::{strings, weight};

pub fn add_to(environment: &mut Environment<'static>) {
    let filters = [
        ("safe", Value::from_function(own::safe)),
        ("lower", Value::from_function(own::lower)),
        ("upper", Value::from_function(own::upper)),
        ("title", Value::from_function(own::title)),
        ("capitalize", Value::from_function(own::capitalize)),
        ("dictsort", Value::from_function(own::dictsort)),
        ("reverse", Value::from_function(own::reverse)),
        ("trim", Value::from_function(own::trim)),
        ("split", Value::from_function(own::split)),
        ("lines", Value::from_function(own::lines)),
        ("round", Value::from_function(own::round)),
        ("abs", Value::from_function(own::abs)),
        ("int", Value::from_function(own::int)),
        ("float", Value::from_function(own::float)),
        ("attr", Value::from_function(own::attr)),
        ("first", Value::from_function(own::first)),
        ("last", Value::from_function(own::last)),
        ("min", Value::from_function(own::min)),
        ("max", Value::from_function(own::max)),
        ("sort", Value::from_function(own::sort)),
        ("list", Value::from_function(own::list)),
        ("bool", Value::from_function(own::bool)),
        ("batch", Value::from_function(own::batch)),
        ("slice", Value::from_function(own::slice)),
        ("sum", Value::from_function(own::sum)),
        ("indent", Value::from_function(own::indent)),
        ("select", Value::from_function(own::select)),
        ("reject", Value::from_function(own::reject)),
        ("selectattr", Value::from_function(own::selectattr)),
        ("rejectattr", Value::from_function(own::rejectattr)),
        ("map", Value::from_function(own::map)),
        ("groupby", Value::from_function(own::groupby)),
        ("unique", Value::from_function(own::unique)),
        ("format", Value::from_function(own::format)),
        ("escape", Value::from_function(own::escape)),
        ("e", Value::from_function(own::escape)),
        // Ours, weighed in the same way.
        ("join", Value::from_function(join)),
        ("replace", Value::from_function(replace)),
        ("items", Value::from_function(super::items)),
        ("tojson", Value::from_function(super::json::to_json)),
    ];
    for (name, filter) in filters {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            look_at(state, name, &args)?;
            let made = filter.call(state, &args)?;
            let made = weight::made(state, made)?;
            // What puts lists into lists.
            if ["batch", "slice", "groupby", "items", "dictsort"].contains(&name) {
                weight::weigh(state, &made)?;
            }
            Ok::<Value, Error>(made)
        });
    }
    // Not of Jinja2. What these make has no bounds.
    for name in ["chain", "zip", "pprint"] {
        environment.remove_filter(name);
    }
    environment.remove_global("debug");
    type Comparison = (&'static [&'static str], fn(&Value, &Value) -> bool);
    let comparisons: [Comparison; 6] = [
        (&["eq", "equalto", "=="], tests::is_eq),
        (&["ne", "!="], tests::is_ne),
        (&["lt", "lessthan", "<"], tests::is_lt),
        (&["le", "<="], tests::is_le),
        (&["gt", "greaterthan", ">"], tests::is_gt),
        (&["ge", ">="], tests::is_ge),
    ];
    for (names, holds) in comparisons {
        for name in names {
            environment.add_test(*name, move |state: &mut State, a: &Value, b: &Value| {
                super::weighed::compared(state, b)?;
                Ok::<bool, Error>(holds(a, b))
            });
        }
    }
    environment.add_test("in", |state: &mut State, a: &Value, b: &Value| {
        super::weighed::compared(state, a)?;
        tests::is_in(state, a, b)
    });
}

/// Before anything is made.
fn look_at(state: &mut State, name: &str, args: &[Value]) -> Result<(), Error> {
    let Some((value, others)) = args.split_first() else {
        return Ok(());
    };
    // So many lists, or lists of so many, whatever they are made of.
    if let ("slice" | "batch", Some(n)) = (name, others.first().and_then(Value::as_usize)) {
        super::weighed::longest(n)?;
    }
    for other in others {
        if let (Some(text), Some(part)) = (value.as_str(), other.as_str()) {
            weight::searched(state, text, part)?;
        }
        weight::weigh(state, other)?;
        weight::no_namespace(other)?;
        weight::joined_bytes(state, other)?;
    }
    let compares = ["sort", "unique", "min", "max", "groupby", "dictsort"].contains(&name);
    match value.as_str() {
        Some(text) => weight::read(state, text)?,
        None if weight::is_container(value) && compares => weight::weigh(state, value)?,
        None => {}
    }
    let texts = [
        "safe",
        "lower",
        "upper",
        "title",
        "capitalize",
        "trim",
        "split",
        "lines",
        "indent",
        "format",
        "escape",
        "e",
        "replace",
    ];
    match texts.contains(&name) {
        true => drop(weight::joined_bytes(state, value)?),
        false if weight::is_container(value) || value.as_str().is_some() => drop(weight::items(value)?),
        false => {}
    }
    let Some(text) = value.as_str() else {
        // A sum of texts would be made anew with each of them.
        return match name == "sum" && starts_with_text(others) {
            true => Err(weight::invalid("sum: only numbers and lists are added")),
            false => Ok(()),
        };
    };
    match name {
        // `&#x27;` and the like.
        "escape" | "e" => weight::room(state, text.len().saturating_mul(6)),
        "split" | "lines" => strings::pieces(state, text, others.first().and_then(Value::as_str)),
        "format" => strings::formatted(state, text, others),
        "indent" => {
            let widths = others
                .iter()
                .flat_map(|other| [Some(other.clone()), other.get_attr("width").ok()]);
            let width = widths
                .flatten()
                .filter_map(|width| width.as_usize())
                .max()
                .unwrap_or(4);
            let lines = text.matches('\n').count() + 1;
            weight::room(state, lines.saturating_mul(width).saturating_add(text.len()))
        }
        _ => Ok(()),
    }
}

fn starts_with_text(others: &[Value]) -> bool {
    let starts = others
        .iter()
        .map(|other| other.get_attr("start").unwrap_or_default());
    starts
        .chain(others.get(1).cloned())
        .any(|start| start.as_str().is_some())
}

fn join(
    state: &mut State,
    value: &Value,
    joiner: Option<String>,
    attribute: Option<String>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let joiner = joiner.or(kwargs.get("d")?).unwrap_or_default();
    let attribute = attribute.or(kwargs.get("attribute")?);
    kwargs.assert_all_used()?;
    let mapped = attribute.map(|attribute| {
        let attribute: Kwargs = [("attribute", Value::from(attribute))].into_iter().collect();
        state.apply_filter("map", &[value.clone(), attribute.into()])
    });
    strings::join(state, &joiner, mapped.transpose()?.as_ref().unwrap_or(value))
}

fn replace(
    state: &mut State,
    text: &Value,
    from: String,
    to: String,
    count: Option<i64>,
) -> Result<String, Error> {
    let text = weight::text(state, text)?;
    strings::replace(state, &text, &from, &to, count)
}
