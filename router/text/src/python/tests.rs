//! Templates and dates against Python.

use super::*;

#[test]
fn strftime_is_pythons() {
    // python3: time.strftime(format, time.gmtime(seconds))
    let cases = [
        ("%d %b %Y", 0, "01 Jan 1970"),
        ("%A, %B %d, %Y", 1_709_164_800, "Thursday, February 29, 2024"),
        (
            "%a %Y-%m-%d %H:%M:%S %-d/%-m/%y 100%%",
            1_735_689_599,
            "Tue 2024-12-31 23:59:59 31/12/24 100%",
        ),
        (
            "%j %-j %u %w %I %p %e %C",
            1_735_689_599,
            "366 366 2 2 11 PM 31 20",
        ),
        (
            "%F %T %R %D %h|%n%t|",
            1_709_164_800,
            "2024-02-29 00:00:00 00:00 02/29/24 Feb|\n\t|",
        ),
        (
            "%c|%x|%X|%-I%p",
            1_709_164_800,
            "Thu Feb 29 00:00:00 2024|02/29/24|00:00:00|12AM",
        ),
    ];
    for (format, seconds, expected) in cases {
        assert_eq!(time::strftime(format, seconds).unwrap(), expected);
    }
    assert!(time::strftime("%Q", 0).is_err());
}

/// python3: str(eval(source))
#[test]
fn slices_are_pythons() {
    let cases = [
        ("[1, 2, 3, 4][::-1]", "[4, 3, 2, 1]"),
        ("[1, 2, 3, 4][3:0:-1]", "[4, 3, 2]"),
        ("[1, 2, 3, 4][2::-2]", "[3, 1]"),
        ("[1, 2, 3, 4][-1:-3:-1]", "[4, 3]"),
        ("[1, 2, 3, 4][10::-1]", "[4, 3, 2, 1]"),
        ("[1, 2, 3, 4][0:5:-1]", "[]"),
        ("[1, 2, 3, 4][:1:-1]", "[4, 3]"),
        ("[1, 2, 3, 4][:-9:-1]", "[4, 3, 2, 1]"),
        ("[1, 2, 3, 4][-9::-1]", "[]"),
        ("[1, 2, 3, 4][::-3]", "[4, 1]"),
        ("[1, 2, 3, 4][1:3]", "[2, 3]"),
        ("[1, 2, 3, 4][:-1]", "[1, 2, 3]"),
        ("[1, 2, 3, 4][::2]", "[1, 3]"),
        ("[1, 2, 3, 4][5:]", "[]"),
        ("[][::-1]", "[]"),
        ("[][3:0:-1]", "[]"),
        ("[][2::-2]", "[]"),
        ("[][-1:-3:-1]", "[]"),
        ("[][10::-1]", "[]"),
        ("[][0:5:-1]", "[]"),
        ("[][:1:-1]", "[]"),
        ("[][:-9:-1]", "[]"),
        ("[][-9::-1]", "[]"),
        ("[][::-3]", "[]"),
        ("[][1:3]", "[]"),
        ("[][:-1]", "[]"),
        ("[][::2]", "[]"),
        ("[][5:]", "[]"),
        ("'abcd'[::-1]", "dcba"),
        ("'abcd'[3:0:-1]", "dcb"),
        ("'abcd'[2::-2]", "ca"),
        ("'abcd'[-1:-3:-1]", "dc"),
        ("'abcd'[10::-1]", "dcba"),
        ("'abcd'[0:5:-1]", ""),
        ("'abcd'[:1:-1]", "dc"),
        ("'abcd'[:-9:-1]", "dcba"),
        ("'abcd'[-9::-1]", ""),
        ("'abcd'[::-3]", "da"),
        ("'abcd'[1:3]", "bc"),
        ("'abcd'[:-1]", "abc"),
        ("'abcd'[::2]", "ac"),
        ("'abcd'[5:]", ""),
        ("''[::-1]", ""),
        ("''[3:0:-1]", ""),
        ("''[2::-2]", ""),
        ("''[-1:-3:-1]", ""),
        ("''[10::-1]", ""),
        ("''[0:5:-1]", ""),
        ("''[:1:-1]", ""),
        ("''[:-9:-1]", ""),
        ("''[-9::-1]", ""),
        ("''[::-3]", ""),
        ("''[1:3]", ""),
        ("''[:-1]", ""),
        ("''[::2]", ""),
        ("''[5:]", ""),
        ("(1, 2, 3)[::-1]", "(3, 2, 1)"),
        ("(1, 2, 3)[3:0:-1]", "(3, 2)"),
        ("(1, 2, 3)[2::-2]", "(3, 1)"),
        ("(1, 2, 3)[-1:-3:-1]", "(3, 2)"),
        ("(1, 2, 3)[10::-1]", "(3, 2, 1)"),
        ("(1, 2, 3)[0:5:-1]", "()"),
        ("(1, 2, 3)[:1:-1]", "(3,)"),
        ("(1, 2, 3)[:-9:-1]", "(3, 2, 1)"),
        ("(1, 2, 3)[-9::-1]", "()"),
        ("(1, 2, 3)[::-3]", "(3,)"),
        ("(1, 2, 3)[1:3]", "(2, 3)"),
        ("(1, 2, 3)[:-1]", "(1, 2)"),
        ("(1, 2, 3)[::2]", "(1, 3)"),
        ("(1, 2, 3)[5:]", "()"),
        ("[7][::-1]", "[7]"),
        ("[7][3:0:-1]", "[]"),
        ("[7][2::-2]", "[7]"),
        ("[7][-1:-3:-1]", "[7]"),
        ("[7][10::-1]", "[7]"),
        ("[7][0:5:-1]", "[]"),
        ("[7][:1:-1]", "[]"),
        ("[7][:-9:-1]", "[7]"),
        ("[7][-9::-1]", "[]"),
        ("[7][::-3]", "[7]"),
        ("[7][1:3]", "[]"),
        ("[7][:-1]", "[]"),
        ("[7][::2]", "[7]"),
        ("[7][5:]", "[]"),
    ];
    let mut environment = environment();
    for (source, expected) in cases {
        environment
            .add_template_owned("case", format!("{{{{ {source} }}}}"))
            .unwrap();
        let printed = render(&environment, "case", Value::from(()));
        assert_eq!(printed.unwrap(), expected, "{source}");
    }
}

/// What transformers prints stands in the fixture, or null where it raises an error.
#[test]
fn templates_print_what_python_prints() {
    let fixture: serde_json::Value = serde_json::from_str(include_str!("../fixture/python.json")).unwrap();
    let mut environment = environment();
    let context = serde_json::json!({
        "schema": {"default": 1e-7, "list": [1e16, 0.0001, 1e-5, 2.0, 123456789.123], "n": 3},
        "messages": [{"role": "user", "content": "Hi "}], "tools": null, "bos_token": "<s>", "eos_token": "</s>",
    });
    let cases = fixture["templates"].as_array().unwrap();
    assert!(cases.len() > 100);
    let mut wrong = Vec::new();
    for case in cases {
        let plain = case["source"].as_str().unwrap();
        let source = source(plain);
        let printed = source.and_then(|source| {
            environment.add_template_owned("case", source)?;
            render(&environment, "case", value(&context))
        });
        match (printed, case["text"].as_str()) {
            (Ok(printed), Some(expected)) if printed == expected => {}
            (Err(_), None) => {}
            (printed, expected) => {
                wrong.push(format!("{plain:?}\n   here {printed:?}\n python {expected:?}"))
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn generation_tags_render_as_nothing() {
    let source = "a {%- generation -%} b {% if x %}c{% endif %}{%endgeneration%}d{% unclosed";
    let expected = "a {%- if true -%} b {% if x %}c{% endif %}{%endif%}d{% unclosed";
    assert_eq!(without_generation_tags(source), expected);
}
