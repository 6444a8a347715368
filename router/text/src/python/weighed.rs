//! Rendering with a limit on what is made: the compiled template, with a weighing before or behind each instruction that makes a
//! value. The template language bounds steps and recursion, but one step of it may double a text. Not here: what may weigh how
//! much (`weight`), filters (`filters`).

use std::collections::BTreeMap;

use minijinja::machinery::{self, Instruction, Instructions, Token};
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};

use super::{slice, syntax, weight};

/// Gives back what it is given.
const FACTOR: &str = "factor";
// Names that no template can write.
const MADE: &str = "!made";
const PAID: &str = "!paid";
const NESTED: &str = "!nested";
const KEPT: &str = "!kept";
const COMPARED: &str = "!compared";
const SOUGHT: &str = "!sought";
const JOINED: &str = "!joined";
const ADDED: &str = "!added";
const REPEATED: &str = "!repeated";
const SLICED: &str = "!sliced";
const MACRO: &str = "!macro";
/// A macro keeps the variables around it.
const MACRO_BYTES: usize = 512;

pub fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter(FACTOR, |value: Value| value);
    environment.add_filter(MADE, weight::made);
    environment.add_filter(PAID, |state: &mut State, value: Value| {
        weight::paid(state, &value)?;
        Ok::<_, Error>(value)
    });
    environment.add_filter(NESTED, |state: &mut State, value: Value| {
        weight::weigh(state, &value)?;
        Ok::<_, Error>(value)
    });
    environment.add_filter(KEPT, |value: Value| {
        weight::no_namespace(&value)?;
        Ok::<_, Error>(value)
    });
    environment.add_filter(COMPARED, |state: &mut State, value: Value| {
        compared(state, &value)?;
        Ok::<_, Error>(value)
    });
    environment.add_filter(MACRO, |state: &mut State, value: Value| {
        weight::spend(state, MACRO_BYTES)?;
        Ok::<_, Error>(value)
    });
    environment.add_filter(SOUGHT, |state: &mut State, wanted: Value, container: Value| {
        compared(state, &wanted)?;
        match (container.as_str(), wanted.as_str()) {
            (Some(text), Some(part)) => weight::searched(state, text, part)?,
            (Some(text), None) => weight::read(state, text)?,
            (None, _) => {}
        }
        Ok::<_, Error>(turned(wanted, container))
    });
    environment.add_filter(JOINED, |state: &mut State, a: Value, b: Value| {
        let bytes = weight::joined_bytes(state, &a)?.saturating_add(weight::joined_bytes(state, &b)?);
        weight::room(state, bytes)?;
        Ok::<_, Error>(turned(a, b))
    });
    environment.add_filter(ADDED, |state: &mut State, a: Value, b: Value| {
        match (a.as_str(), b.as_str()) {
            (Some(a), Some(b)) => weight::room(state, a.len() + b.len())?,
            _ if weight::is_container(&a) && weight::is_container(&b) => {
                longest(weight::items(&a)?.saturating_add(weight::items(&b)?))?;
            }
            _ => {}
        }
        Ok::<_, Error>(turned(a, b))
    });
    environment.add_filter(
        SLICED,
        |state: &mut State, value: Value, start: Value, stop: Value, step: Value| {
            let mut parts = slice::turned(state, value, start, stop, step)?;
            // As in `turned`.
            parts.reverse();
            Ok::<_, Error>(Value::from(parts.to_vec()))
        },
    );
    environment.add_filter(REPEATED, |state: &mut State, a: Value, b: Value| {
        for (value, n) in [(&a, &b), (&b, &a)] {
            let Some(n) = n.as_usize() else { continue };
            match value.as_str() {
                Some(text) => weight::room(state, text.len().saturating_mul(n))?,
                None if weight::is_container(value) => longest(weight::items(value)?.saturating_mul(n))?,
                None => {}
            }
        }
        Ok::<_, Error>(turned(a, b))
    });
}

/// Compiled templates unpack a list so that its first item is the one to take first.
fn turned(a: Value, b: Value) -> Value {
    Value::from(vec![b, a])
}

pub fn longest(items: usize) -> Result<(), Error> {
    match items <= weight::MAX_ITEMS {
        true => Ok(()),
        false => Err(weight::invalid(&format!(
            "a list of {items} items is longer than the {} that are allowed",
            weight::MAX_ITEMS
        ))),
    }
}

pub fn compared(state: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => weight::read(state, text),
        None if weight::is_container(value) => weight::weigh(state, value),
        None => Ok(()),
    }
}

pub fn render(environment: &Environment<'static>, name: &str, variables: Value) -> Result<String, Error> {
    let template = environment.get_template(name)?;
    let compiled = machinery::get_compiled_template(&template);
    let instructions = weighed(&compiled.instructions)?;
    let blocks = compiled
        .blocks
        .iter()
        .map(|(name, block)| Ok((*name, weighed(block)?)));
    let blocks = blocks.collect::<Result<BTreeMap<_, _>, Error>>()?;
    let mut text = String::new();
    let mut out = machinery::make_string_output(&mut text);
    machinery::eval(
        environment,
        &instructions,
        variables,
        &blocks,
        &mut out,
        AutoEscape::None,
    )?;
    drop(out);
    Ok(text)
}

/// The same instructions with the weighing between them.
fn weighed<'a>(plain: &Instructions<'a>) -> Result<Instructions<'a>, Error> {
    let all = || (0..).map_while(|i| plain.get(i));
    let mut places = Vec::new();
    let mut place = 0;
    for instruction in all() {
        places.push(place);
        place += around(instruction)?.len() as u32;
    }
    places.push(place);
    let mut weighed = Instructions::new(plain.name(), plain.source());
    for (i, instruction) in all().enumerate() {
        let line = plain.get_line(i as u32);
        for mut instruction in around(instruction)? {
            match &mut instruction {
                Instruction::Iterate(target)
                | Instruction::Jump(target)
                | Instruction::JumpIfFalse(target)
                | Instruction::JumpIfFalseOrPop(target)
                | Instruction::JumpIfTrueOrPop(target)
                | Instruction::BuildMacro(_, target, _) => *target = places[*target as usize],
                _ => {}
            }
            match line.and_then(|line| u16::try_from(line).ok()) {
                Some(line) => weighed.add_with_line(instruction, line),
                None => weighed.add(instruction),
            };
        }
    }
    Ok(weighed)
}

/// An instruction with what must come before and behind it.
fn around<'a>(instruction: &Instruction<'a>) -> Result<Vec<Instruction<'a>>, Error> {
    use Instruction as I;
    let filter = |name, args| I::ApplyFilter(name, Some(args), u8::MAX);
    let of_two = |name, instruction| vec![filter(name, 2), I::UnpackList(2), instruction];
    let same = instruction.clone();
    Ok(match instruction {
        // As text that is printed, which is where it is counted.
        I::EmitRaw(text) => vec![I::LoadConst(Value::from(*text)), I::Emit],
        I::StringConcat => [of_two(JOINED, same), vec![filter(MADE, 1)]].concat(),
        I::Add => [of_two(ADDED, same), vec![filter(MADE, 1)]].concat(),
        I::Mul => [of_two(REPEATED, same), vec![filter(MADE, 1)]].concat(),
        I::In => of_two(SOUGHT, same),
        I::Slice => vec![filter(SLICED, 4), I::UnpackList(4), same, filter(MADE, 1)],
        I::BuildList(_) | I::BuildTuple(_) | I::BuildMap(_) => vec![same, filter(NESTED, 1)],
        I::CallFunction(..) | I::CallMethod(..) | I::CallObject(_) => vec![same, filter(PAID, 1)],
        I::SetAttr(_) => vec![I::Swap, filter(KEPT, 1), I::Swap, same],
        I::BuildMacro(..) => vec![same, filter(MACRO, 1)],
        I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte | I::CompareAndPreserve(_) | I::GetItem => {
            vec![filter(COMPARED, 1), same]
        }
        I::Include(_) | I::LoadBlocks => {
            let message = "a chat template is alone: there is nothing to include, to import or to extend";
            return Err(Error::new(ErrorKind::SyntaxError, message));
        }
        _ => vec![same],
    })
}

/// The compiler computes `'x' * 100000000` itself: a factor that is no constant keeps it from that.
pub fn without_constant_factors(source: &str) -> Result<String, Error> {
    let mut out = String::with_capacity(source.len());
    let (mut done, mut ends_operand) = (0, false);
    for token in machinery::tokenize(source, false, syntax()) {
        let (token, span) = token?;
        if matches!(token, Token::Mul) && ends_operand {
            let at = span.start_offset as usize;
            out.push_str(&source[done..at]);
            out.push_str(&format!("|{FACTOR} "));
            done = at;
        }
        ends_operand = matches!(
            token,
            Token::Ident(_)
                | Token::Str(_)
                | Token::String(_)
                | Token::Int(_)
                | Token::Int128(_)
                | Token::Float(_)
                | Token::ParenClose
                | Token::BracketClose
                | Token::BraceClose
        );
    }
    out.push_str(&source[done..]);
    Ok(out)
}
