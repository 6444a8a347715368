//! GBNF, the grammars of llama.cpp, as lark. Reference: grammars/README.md of llama.cpp.
//!
//! A GBNF is a grammar over characters, lark's is one over the words of a lexer, which takes the longest. So every
//! character becomes a word of its own: then both describe the same texts.

use std::collections::HashMap;
use std::fmt::Write;

use super::{BadGrammar, lark_text};

const ASSIGN: &str = "::=";
/// Groups within groups.
const MAX_DEPTH: usize = 200;

/// Its rules are assigned with `::=`, which lark's never are, outside of texts.
pub fn is_gbnf(text: &str) -> bool {
    let begins_a_rule = |line: &str| {
        let name = line.trim_start().split(ASSIGN).next().unwrap_or_default();
        line.contains(ASSIGN) && !name.trim().is_empty() && name.trim().chars().all(is_name)
    };
    text.lines().any(begins_a_rule)
}

pub fn to_lark(text: &str) -> Result<String, BadGrammar> {
    let mut reader = Reader {
        text,
        at: 0,
        rules: HashMap::new(),
        lark: String::new(),
    };
    let mut defined: Vec<String> = vec![];
    reader.skip(Lines::Cross);
    while !reader.rest().is_empty() {
        let name = reader.name()?;
        reader.skip(Lines::Stay);
        if !reader.take(ASSIGN) {
            return Err(reader.wrong(&format!("{ASSIGN} is expected after the name {name:?}")));
        }
        if defined.contains(&name) {
            return Err(reader.wrong(&format!("the rule {name:?} is defined twice")));
        }
        let rule = reader.rule(&name);
        write!(reader.lark, "{rule}: ").expect("a String takes everything");
        defined.push(name);
        reader.skip(Lines::Cross);
        reader.alternatives(0)?;
        reader.lark.push('\n');
        reader.skip(Lines::Cross);
    }
    if !defined.iter().any(|name| name == "root") {
        return Err(BadGrammar(
            "a GBNF begins at the rule root, and has none".to_owned(),
        ));
    }
    match reader.rules.keys().find(|name| !defined.contains(name)) {
        Some(name) => Err(BadGrammar(format!("the rule {name:?} is used but not defined"))),
        None => Ok(format!("start: {}\n{}", reader.rule("root"), reader.lark)),
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// Names in lark.
    rules: HashMap<String, usize>,
    lark: String,
}

/// Whether white space may hold an end of line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    Stay,
    Cross,
}

impl Reader<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn take(&mut self, text: &str) -> bool {
        let there = self.rest().starts_with(text);
        if there {
            self.at += text.len();
        }
        there
    }

    fn wrong(&self, what: &str) -> BadGrammar {
        let line = self.text[..self.at].matches('\n').count() + 1;
        BadGrammar(format!("line {line} of the GBNF: {what}"))
    }

    fn skip(&mut self, lines: Lines) {
        while let Some(c) = self.peek() {
            match c {
                '#' => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.next();
                    }
                }
                '\n' | '\r' if lines == Lines::Stay => return,
                c if c.is_whitespace() => drop(self.next()),
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Result<String, BadGrammar> {
        let name: String = self.rest().chars().take_while(|&c| is_name(c)).collect();
        if name.is_empty() {
            return Err(self.wrong("a rule's name is expected"));
        }
        self.at += name.len();
        Ok(name)
    }

    fn rule(&mut self, name: &str) -> String {
        let next = self.rules.len();
        format!("r{}", self.rules.entry(name.to_owned()).or_insert(next))
    }

    /// Up to the closing parenthesis, or to where the next rule begins.
    fn alternatives(&mut self, depth: usize) -> Result<(), BadGrammar> {
        if depth > MAX_DEPTH {
            return Err(self.wrong(&format!("groups are nested more than {MAX_DEPTH} deep")));
        }
        let lines = Lines::Cross;
        let mut is_empty = true;
        loop {
            self.skip(lines);
            let piece = match self.peek() {
                None => break,
                Some(')') if depth > 0 => break,
                Some('|') => {
                    if is_empty {
                        self.lark.push_str("\"\"");
                    }
                    self.next();
                    self.lark.push_str(" | ");
                    is_empty = true;
                    continue;
                }
                Some('(') => {
                    self.next();
                    self.lark.push('(');
                    self.alternatives(depth + 1)?;
                    if self.next() != Some(')') {
                        return Err(self.wrong("a group is not closed"));
                    }
                    ")".to_owned()
                }
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.next();
                    "/(?s:.)/".to_owned()
                }
                Some(c) if is_name(c) => {
                    let before = self.at;
                    let name = self.name()?;
                    self.skip(Lines::Stay);
                    if self.rest().starts_with(ASSIGN) {
                        if depth > 0 {
                            return Err(self.wrong("a group is not closed"));
                        }
                        self.at = before;
                        break;
                    }
                    self.rule(&name)
                }
                Some(c) => return Err(self.wrong(&format!("{c:?} is not understood"))),
            };
            self.lark.push_str(&piece);
            self.repetition()?;
            self.lark.push(' ');
            is_empty = false;
        }
        if is_empty {
            self.lark.push_str("\"\"");
        }
        Ok(())
    }

    fn repetition(&mut self) -> Result<(), BadGrammar> {
        self.skip(Lines::Stay);
        match self.peek() {
            Some(c @ ('*' | '+' | '?')) => {
                self.next();
                self.lark.push(c);
            }
            Some('{') => {
                let end = self
                    .rest()
                    .find('}')
                    .ok_or_else(|| self.wrong("{ is not closed"))?;
                let given = self.rest()[1..end].to_owned();
                let number = |text: &str| text.trim().parse::<u32>().ok();
                let known = match given.split_once(',') {
                    None => number(&given).is_some(),
                    Some((low, high)) => {
                        number(low).is_some() && (high.trim().is_empty() || number(high).is_some())
                    }
                };
                if !known {
                    return Err(self.wrong(&format!("{{{given}}} is no repetition")));
                }
                self.at += end + 1;
                let given: String = given.chars().filter(|c| !c.is_whitespace()).collect();
                write!(self.lark, "{{{given}}}").expect("a String takes everything");
            }
            _ => {}
        }
        Ok(())
    }

    fn literal(&mut self) -> Result<String, BadGrammar> {
        self.next();
        let mut words = vec![];
        loop {
            match self.next() {
                None | Some('\n') => return Err(self.wrong("a text is not closed")),
                Some('"') => break,
                Some('\\') => words.push(lark_text(&self.escape()?.to_string())),
                Some(c) => words.push(lark_text(&c.to_string())),
            }
        }
        Ok(match words.len() {
            0 => "\"\"".to_owned(),
            1 => words.remove(0),
            _ => format!("({})", words.join(" ")),
        })
    }

    fn class(&mut self) -> Result<String, BadGrammar> {
        self.next();
        let mut class = String::from("/[");
        if self.take("^") {
            class.push('^');
        }
        let mut is_empty = true;
        loop {
            let c = match self.next() {
                None | Some('\n') => return Err(self.wrong("a class is not closed")),
                Some(']') => break,
                Some('-') if !is_empty && self.peek() != Some(']') => {
                    class.push('-');
                    continue;
                }
                Some('\\') => self.escape()?,
                Some(c) => c,
            };
            write!(class, "\\u{{{:x}}}", u32::from(c)).expect("a String takes everything");
            is_empty = false;
        }
        if is_empty {
            return Err(self.wrong("a class is empty"));
        }
        Ok(class + "]/")
    }

    fn escape(&mut self) -> Result<char, BadGrammar> {
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c) if !c.is_alphanumeric() => return Ok(c),
            _ => return Err(self.wrong("an escape is not understood")),
        };
        let code = self
            .rest()
            .get(..digits)
            .and_then(|code| u32::from_str_radix(code, 16).ok());
        let c = code.and_then(char::from_u32);
        let c = c.ok_or_else(|| self.wrong("an escape names no character"))?;
        self.at += digits;
        Ok(c)
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}
