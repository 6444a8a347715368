//! Against texts: which a grammar takes whole, over a vocabulary of single bytes and some longer tokens.

use serde_json::json;

use super::*;

/// Bytes, some words, and two tokens that are not made of characters.
fn compiler() -> Compiler {
    let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    tokens.extend(["\"name\"", "true", "{\"", "ab", "</", "<call"].map(|text| text.as_bytes().to_vec()));
    let mut special = vec![false; tokens.len()];
    tokens.extend(["<end>", "<|tool|>"].map(|text| text.as_bytes().to_vec()));
    special.extend([true, true]);
    let ends = vec![tokens.len() as u32 - 2];
    Compiler::new(&Vocabulary {
        tokens,
        special,
        ends,
    })
    .unwrap()
}

const END: u32 = 262;
const TOOL: u32 = 263;

/// Byte by byte; `<|tool|>` is its token.
fn ids(text: &str) -> Vec<u32> {
    let mut ids = vec![];
    let mut rest = text;
    while let Some(at) = rest.find("<|tool|>") {
        ids.extend(rest[..at].bytes().map(u32::from));
        ids.push(TOOL);
        rest = &rest[at + "<|tool|>".len()..];
    }
    ids.extend(rest.bytes().map(u32::from));
    ids
}

/// Whether the whole text is a sentence; masks must agree with what is taken.
fn takes(compiler: &Compiler, grammar: &Grammar, text: &str) -> bool {
    let mut guide = compiler
        .compile(grammar)
        .unwrap_or_else(|error| panic!("{error}\n{}", grammar.text()));
    let ids = ids(text);
    for (at, &id) in ids.iter().enumerate() {
        if !guide.mask(&[END]).unwrap().allows(id) {
            return false;
        }
        if guide.advance(id).unwrap() == Next::Complete {
            return at + 1 == ids.len();
        }
    }
    guide.mask(&[END]).unwrap().allows(END)
}

fn check(grammar: Result<Grammar, BadGrammar>, yes: &[&str], no: &[&str]) {
    let (grammar, compiler) = (grammar.unwrap(), compiler());
    for text in yes {
        assert!(
            takes(&compiler, &grammar, text),
            "{text:?} by\n{}",
            grammar.text()
        );
    }
    for text in no {
        assert!(
            !takes(&compiler, &grammar, text),
            "{text:?} by\n{}",
            grammar.text()
        );
    }
}

fn schema(schema: Value) -> Result<Grammar, BadGrammar> {
    Grammar::json_schema(&schema, &Whitespace::Usual)
}

#[test]
fn grammars_take_their_sentences_and_no_others() {
    let texts = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
    check(
        schema(
            json!({"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
                      "required": ["name", "n"], "additionalProperties": false}),
        ),
        &[
            "{\"name\": \"a\", \"n\": 3}",
            "{\n  \"name\":\"\u{e9}\",\n  \"n\":-1}",
        ],
        &[
            "{}",
            "{\"n\": 3, \"name\": \"a\"}",
            "{\"name\": \"a\", \"n\": 3.5}",
            "{\"name\":  \"a\"",
            " {}",
        ],
    );
    check(schema(json!(true)), &["3", "null", "[1, {}]"], &["", "x"]);
    check(
        Ok(Grammar::json_object(&Whitespace::None)),
        &["{}", "{\"a\":[1,2]}"],
        &["[]", "{ }", "{\"a\": 1}"],
    );
    check(
        Ok(Grammar::regex(r"^[a-z]+\d{2}/\$$")),
        &["ab12/$"],
        &["ab1", "12", "ab12/$x"],
    );
    check(
        Grammar::choice(&texts(&["yes", "yes, \"sir\"", "no\n"])),
        &["yes", "yes, \"sir\"", "no\n"],
        &["", "ye", "no", "yes, "],
    );
    check(
        Grammar::lark_or_gbnf("start: \"a\" b*\nb: \"b\" | \"(\" b \")\""),
        &["a", "abb", "ab((b))"],
        &["b", "a(", "ab)"],
    );
    check(
        Grammar::lark_or_gbnf(
            "# numbers\nroot ::= item (\", \" item){0,2} \".\"? # some\nitem ::= [a-c\\-]+ |\n   \"a\" \"bd\" | \"\\u00e9\"\n  | [^\\x00-\\x7f\u{e9}]",
        ),
        &["a", "abd, \u{e9}", "c-a, \u{1f980}, b.", "ab, ab"],
        &["", "a, a, a, a", "d", "a,a", "\u{e9}\u{e9}", "ab, d"],
    );
}

#[test]
fn texts_of_which_parts_are_bound() {
    let special = [("<|tool|>".to_owned(), TOOL)];
    let format = |format: Format| Grammar::format(&format, &special);
    let number = || json!({"type": "integer"});
    let tags = || {
        vec![
            Tag::json("<call a>", number(), "</call>"),
            Tag::json("<call b>", json!({"const": "x"}), "</call>"),
        ]
    };
    let beginning = |not_first: &[&str], at_least_one, stop_after_first| {
        format(Format::Triggered {
            triggers: vec!["<call".to_owned()],
            tags: tags(),
            at_least_one,
            stop_after_first,
            not_first: not_first.iter().map(|&text| text.to_owned()).collect(),
        })
    };
    let triggered = |at_least_one, stop_after_first| beginning(&[], at_least_one, stop_after_first);
    for stop_after_first in [false, true] {
        check(
            beginning(&[r"\{", r"go\s*\("], false, stop_after_first),
            &[
                "",
                " ",
                "hello {",
                "<call a>3</call>",
                " go on (<call a>3</call>",
                "go",
            ],
            &["{", " go(", "\n{ <call a>3</call>", "go\n(", "<call a>x"],
        );
    }
    check(
        beginning(&[r"\{"], true, false),
        &["<call a>3</call> {", "hi <call a>3</call>{<call b>\"x\"</call>"],
        &["", "hi", "{<call a>3</call>"],
    );
    check(
        triggered(false, false),
        &[
            "",
            "hello <b>",
            "hi <call a>3</call> and <call b>\"x\"</call>\nbye",
        ],
        &["<call", "<call c>", "<call a>x", "hi <call a>3</call> <call a>"],
    );
    check(
        triggered(true, true),
        &["hi <call a>3</call>"],
        &["", "hi", "<call a>3</call> "],
    );
    check(
        triggered(false, true),
        &["", "hi", "<call a>3</call>"],
        &["<call a>3</call> "],
    );
    let separated = |at_least_one, stop_after_first| {
        format(Format::Separated {
            tags: tags(),
            separator: ", ".to_owned(),
            at_least_one,
            stop_after_first,
        })
    };
    check(
        separated(true, false),
        &["<call a>3</call>, <call b>\"x\"</call>"],
        &["", "hi", "<call a>3</call>, "],
    );
    check(
        separated(false, true),
        &["", "<call a>3</call>"],
        &["<call a>3</call>, <call a>3</call>"],
    );
    let field = |text: &str, is_required| Field {
        format: Format::Text(text.to_owned()),
        is_required,
    };
    let fields = |fields| {
        format(Format::Fields {
            fields,
            separator: ",".to_owned(),
        })
    };
    check(
        fields(vec![
            field("a", false),
            field("b", true),
            field("c", false),
            field("d", false),
        ]),
        &["b", "a,b", "b,d", "a,b,c,d"],
        &["", "a", ",b", "a,b,", "b,a", "a,c", "bd"],
    );
    check(
        fields(vec![field("a", false), field("b", false)]),
        &["", "a", "b", "a,b"],
        &["ab", ",b"],
    );
    check(fields(vec![]), &[""], &["a"]);
    check(
        format(Format::Sequence(vec![
            Format::Tag(Box::new(Tag {
                begin: "<think>".to_owned(),
                content: Format::AnyText,
                end: "</think>".to_owned(),
            })),
            Format::Text("\n".to_owned()),
            Format::Or(vec![
                Format::Schema(number()),
                Format::Regex("none|n/a".to_owned()),
            ]),
        ])),
        &["<think>so < it is\n</think>\n12", "<think></think>\nn/a"],
        &["12", "<think>a</think>b</think>\n1", "<think>a</think>"],
    );
    check(
        format(Format::Tag(Box::new(Tag::json(
            "<|tool|>[",
            number(),
            "]<|tool|>",
        )))),
        &["<|tool|>[3]<|tool|>"],
        &["[3]", "<|tool|>[3]"],
    );
    check(
        format(Format::Sequence(vec![
            Format::AnyText,
            Format::Text("<|tool|>".to_owned()),
            Format::Lark("start: \"a\"+".to_owned()),
        ])),
        &["hello<|tool|>aa", "<|tool|>a"],
        &["hello", "hello<|tool|>b"],
    );
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_place() {
    let compiler = compiler();
    let deep = json!({"type": "object", "properties": {
        "a": {"type": "string"},
        "b/c": {"type": "array", "items": {"$ref": "#/$defs/set"}}},
        "$defs": {"other": {"not": {}}, "set": {"type": "array", "uniqueItems": true, "items": {"type": "integer"}}}});
    for (schema, part) in [
        (
            deep,
            "at #/$defs/set: the keywords [\"uniqueItems\"] cannot be honoured",
        ),
        (json!({"not": {"type": "string"}}), "at #: the keywords [\"not\"]"),
        (
            json!({"anyOf": [{"type": "integer"}, {"type": "text"}]}),
            "at #/anyOf/1: ",
        ),
        (
            json!({"type": "object", "properties": {"x": {"oneOf": [{"minimum": 1}, {"maximum": 5}]}}}),
            "at #/properties/x: oneOf can only",
        ),
        (json!({"items": {"pattern": "(?=a)b"}}), "at #/items: "),
        (json!({"$ref": "https://example.org/schema.json"}), "at #: "),
        (json!({"type": "integer", "minimum": 3, "maximum": 2}), "at #: "),
    ] {
        let grammar = Grammar::json_schema(&schema, &Whitespace::Usual).unwrap();
        let refusal = compiler.compile(&grammar).err().expect("refused").to_string();
        assert!(refusal.starts_with(part), "{schema}: {refusal}");
    }
    for (text, part) in [
        ("start: a", "a"),
        ("start: \"a", ""),
        ("begin: \"a\"", "start"),
        ("start: /(?=a)b/", ""),
    ] {
        let refusal = compiler
            .compile(&Grammar::lark(text))
            .err()
            .expect("refused")
            .to_string();
        assert!(refusal.contains(part), "{text}: {refusal}");
    }
    for (text, part) in [
        ("a ::= \"x\"", "root"),
        ("root ::= b", "\"b\" is used but not defined"),
        (
            "root ::= (\"x\"\nb ::= \"y\"",
            "line 2 of the GBNF: a group is not closed",
        ),
        ("root ::= \"x\nb ::= [", "a text is not closed"),
        ("root ::= [a", "a class is not closed"),
        ("root ::= \"x\"{a}", "{a} is no repetition"),
    ] {
        let refusal = Grammar::lark_or_gbnf(text).unwrap_err().to_string();
        assert!(refusal.contains(part), "{text}: {refusal}");
    }
    assert!(Grammar::json_schema(&json!(3), &Whitespace::Usual).is_err());
    assert!(Grammar::json_schema(&json!(false), &Whitespace::Usual).is_err());
    assert!(Grammar::choice(&[]).is_err());
}

/// Nobody can end the process by a schema: what nests or refers too deep is refused.
#[test]
fn nothing_overflows_a_stack() {
    let nested = |open: &str, close: &str, inner: &str, n: usize| open.repeat(n) + inner + &close.repeat(n);
    let chain = |n: usize| {
        let links = (0..n).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})));
        let mut defs: serde_json::Map<String, Value> = links.collect();
        defs.insert(format!("d{n}"), json!({"type": "string"}));
        json!({"$ref": "#/$defs/d0", "$defs": defs})
    };
    let compile = std::thread::Builder::new().stack_size(STACK_BYTES);
    let thread = compile.spawn(move || {
        let compiler = compiler();
        let grammars = [
            Grammar::lark(format!("start: {}", nested("(", ")", "\"a\"", 100_000))),
            Grammar::lark(format!("start: /{}/", nested("(", ")", "a", 100_000))),
            Grammar::json_schema(&chain(10_000), &Whitespace::Usual).unwrap(),
            Grammar::json_schema(
                &json!({"pattern": nested("(", ")*", "a", 50_000)}),
                &Whitespace::Usual,
            )
            .unwrap(),
            Grammar::json_schema(
                &json!({"pattern": "a{1,1000000}b{1,1000000}"}),
                &Whitespace::Usual,
            )
            .unwrap(),
            Grammar::json_schema(
                &json!({"type": "string", "maxLength": 100_000_000}),
                &Whitespace::Usual,
            )
            .unwrap(),
            Grammar::json_schema(
                &json!({"type": "array", "minItems": 100_000_000}),
                &Whitespace::Usual,
            )
            .unwrap(),
            Grammar::regex("((a{1,1000}){1,1000}){1,1000}"),
        ];
        for grammar in grammars {
            // Taken or refused; but it comes back.
            let _ = compiler.compile(&grammar);
        }
    });
    thread.unwrap().join().unwrap();
}
