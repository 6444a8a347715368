//! Expressions, dates and tags against Python.

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
    ];
    for (format, seconds, expected) in cases {
        assert_eq!(strftime(format, seconds).unwrap(), expected);
    }
    assert!(strftime("%Q", 0).is_err());
}

#[test]
fn expressions_give_what_python_gives() {
    // Right: what Jinja2 3.1.6 prints, with transformers' tojson.
    let cases = [
        (
            "'  a b '.strip() ~ '|' ~ 'xxaxx'.strip('x') ~ '|' ~ ' a '.lstrip() ~ '|' ~ ' a '.rstrip()",
            "a b|a|a | a",
        ),
        ("'a</think>b</think>c'.split('</think>')[-1]", "c"),
        ("' a  b c '.split() | join('|')", "a|b|c"),
        ("' a  b c '.split(none, 1) | join('|')", "a|b c "),
        ("' a  b c '.rsplit(none, 1) | join('|')", " a  b|c"),
        (
            "'a,b,c'.split(',', 1) | join('|') ~ ' ' ~ 'a,b,c'.rsplit(',', 1) | join('|')",
            "a|b,c a,b|c",
        ),
        ("'abc'.startswith('ab') and 'abc'.endswith(('x', 'bc'))", "True"),
        (
            "'a-b'.replace('-', '+') ~ 'x'.upper() ~ 'Y'.lower() ~ 'hello wORLD'.title() ~ 'aB'.capitalize()",
            "a+bXyHello WorldAb",
        ),
        ("'né!'.find('!') ~ ' ' ~ 'abc'.find('x')", "2 -1"),
        (
            "{'a': 1, 'b': none}.items() | list | length ~ {'a': 1}.get('b', 'none') ~ {'a': 1}.get('b')",
            "2noneNone",
        ),
        (
            "{'b': 1, 'a': 2}.keys() | join(',') ~ {'b': 1, 'a': 2}.values() | join(',')",
            "b,a1,2",
        ),
        (
            "{'x': ['<é>', 1, 2.5, none, true], 'y': {}} | tojson",
            r#"{"x": ["<é>", 1, 2.5, null, true], "y": {}}"#,
        ),
        (
            "{'x': [1], 'y': []} | tojson(indent=2)",
            "{\n  \"x\": [\n    1\n  ],\n  \"y\": []\n}",
        ),
        ("'a\nb'.splitlines() | length", "2"),
        (
            "[1, 2, 3][::-1] | join ~ [1, 2, 3][1:] | join ~ [1, 2, 3][-1]",
            "321233",
        ),
        ("true ~ none ~ 1.0", "TrueNone1.0"),
        (
            "'ab' * 2 ~ '12'.isdigit() ~ ''.isalpha() ~ 10 // 3 ~ 7 % 4",
            "ababTrueFalse33",
        ),
    ];
    let environment = environment();
    for (expression, expected) in cases {
        assert_eq!(
            environment
                .render_str(&format!("{{{{ {expression} }}}}"), ())
                .unwrap(),
            expected,
            "{expression}"
        );
    }
    assert!(environment.render_str("{{ 'a'.nonsense() }}", ()).is_err());
}

#[test]
fn generation_tags_render_as_nothing() {
    let source = "a {%- generation -%} b {% if x %}c{% endif %}{%endgeneration%}d{% unclosed";
    let expected = "a {%- if true -%} b {% if x %}c{% endif %}{%endif%}d{% unclosed";
    assert_eq!(without_generation_tags(source), expected);
}
