"""Makes router/text/src/fixture/python.json: what transformers renders from our templates and prints of expressions.

The inputs stand here, the outputs come from transformers alone. Nothing of Tandem runs.
"""

import json
import pathlib

import jinja2
import tokenizers
import transformers

FIXTURES = pathlib.Path(__file__).parents[2] / "router/text/src/fixture"

SCHEMA = {"default": 1e-7, "list": [1e16, 0.0001, 1e-5, 2.0, 123456789.123], "n": 3}

# Printed by `{{ ... }}`, alone in a template.
EXPRESSIONS = [
    # Methods of strings.
    "'  a b '.strip() ~ '|' ~ 'xxaxx'.strip('x') ~ '|' ~ ' a '.lstrip() ~ '|' ~ ' a '.rstrip() ~ '|' ~ ' a '.strip(none)",
    r"'\x1c a \x1f'.strip()",
    "'a</think>b</think>c'.split('</think>')[-1]",
    "' a  b c '.split()",
    "' a  b c '.split(none, 1)",
    "' a  b c '.rsplit(none, 1)",
    "'a,b,c'.split(',', 1) ~ 'a,b,c'.rsplit(',', maxsplit=1) ~ 'a,b'.split(sep=',')",
    "'a'.split('')",
    "'abc'.startswith('ab') and 'abc'.endswith(('x', 'bc'))",
    "'abc'.startswith('b', 1) ~ 'abc'.endswith('b', 0, 2) ~ 'abc'.startswith('', 4) ~ 'abc'.startswith('c', -1)",
    "'a-b'.replace('-', '+') ~ 'aaa'.replace('a', 'b', 2) ~ 'ab'.replace('', '-') ~ 'aa'.replace('a', 'b', -1)",
    "'x'.upper() ~ 'Y'.lower() ~ 'hello wORLD'.title() ~ 'aB'.capitalize() ~ \"they're x2y\".title()",
    "'né!'.find('!') ~ ' ' ~ 'abc'.find('x') ~ 'abcabc'.rfind('b') ~ 'abcabc'.find('b', 2) ~ 'abcabc'.index('c', -2)",
    "'abc'.index('x')",
    "'banana'.count('an') ~ 'banana'.count('a', 2) ~ 'ab'.count('')",
    "'ab'.removeprefix('a') ~ 'ab'.removesuffix('b') ~ 'ab'.removeprefix('x')",
    r"'a\nb\r\nc\rd\x0be'.splitlines() ~ 'a\nb'.splitlines(true) ~ ''.splitlines() ~ '\n'.splitlines(keepends=true)",
    "'-'.join(['a', 'b']) ~ ','.join('xyz')",
    "'ab'.ljust(4) ~ '|' ~ 'ab'.rjust(4, '.') ~ '|' ~ 'ab'.center(5, '*') ~ '|' ~ 'abc'.center(6, '*') ~ '|' ~ 'é'.center(1)",
    "'5'.zfill(3) ~ ' ' ~ '-5'.zfill(4) ~ ' ' ~ 'abc'.zfill(2)",
    "'a=b=c'.partition('=') ~ 'a=b=c'.rpartition('=') ~ 'abc'.partition('=') ~ 'abc'.rpartition('=')",
    "'12'.isdigit() ~ ''.isalpha() ~ 'ab1'.isalnum() ~ ' \t'.isspace() ~ 'AB1'.isupper() ~ 'aB'.islower() ~ 'Ab Cd'.istitle()",
    "'{} is {}'.format('a', 1) ~ '{1}{0}'.format('a', 'b') ~ '{x:>4}|{y}'.format(x=3, y='q') ~ '{{}}'.format()",
    "'{:.2f} {:05d} {:,}'.format(3.14159, 42, 1234567)",
    "'{0[a]} {0.x}'.format({'a': 1, 'x': 2})",
    "'{}'.format()",
    "'a'.nonsense()",
    "'ab' * 2 ~ 'abc'[0] ~ 'abc'[-1] ~ 'abc'[1:] ~ 'abc'[::-1] ~ 'abc'[5:] ~ ('b' in 'abc')",
    "'abc'.foo is defined",
    "'%s-%d-%5.1f' | format('a', 3, 2.25)",
    # Methods of lists and dictionaries.
    "[1, 2, 1].count(1) ~ [3, 4].index(4)",
    "[1].append(2)",
    "{'a': 1}.update({'b': 2})",
    "{'a': 1}.pop('a')",
    "{'a': 1, 'b': none}.items() | list",
    "{'b': 1, 'a': 2}.keys() | list ~ {'b': 1, 'a': 2}.values() | list",
    "{'a': 1}.get('b', 'none') ~ {'a': 1}.get('b') ~ {'a': 1}.get('a')",
    "{'items': 1, 'get': 2}.items() | list ~ {'items': 1}['items']",
    "{'a': 1}.copy() ~ [1].copy()",
    "{'a': 1}.a ~ {'a': 1}['a'] ~ ({'a': 1}.b is defined) ~ ('a' in {'a': 1}) ~ (1 in [1, 2])",
    # Numbers and how they print.
    "[1e-7, 0.0001, 1e-05, 1e15, 1e16, 1.5e16, 123456789.123, 0.1, 2.0, 1e300, -1.5e-10, 1e22]",
    "1e-7", "0.00001 | string", "100000000000000000.0", "2.5e20",
    "{'default': 1e-7, 'n': 1e16, 'm': 3} | tojson",
    "10 // 3 ~ 7 % 4 ~ -7 // 2 ~ -7 % 3 ~ 2 ** 3 ~ 7 / 2 ~ 4 / 2",
    "1 / 0",
    "true ~ none ~ 1.0 ~ (1 == 1.0) ~ (true == 1)",
    "'1' ~ 2 ~ 3.5",
    "'a' + 1",
    "1 + 2 * 3 - 4",
    "3.7 | int ~ '12' | int ~ 'x' | int(5) ~ '3.5' | float ~ 3 | float ~ 2.567 | round(1) ~ -3 | abs",
    # Lists and dictionaries in print.
    "{'a': [1, 'x', none, true, {}], \"it's\": 'say \"hi\"', 'n': ('t', ), 'both': \"'\\\"\"}",
    r"['é', '\n\t\\', '\x07', '​', ' ', '😀', 'e\u0301']",
    "(1, 2) ~ (1,) ~ ()",
    "[1, 2, 3][::-1] ~ [1, 2, 3][1:] ~ [1, 2, 3][-1] ~ [[1], 2][0][0]",
    # tojson.
    "{'x': ['<é>', 1, 2.5, none, true], 'y': {}, 'z': []} | tojson",
    "{'x': [1, {'a': []}], 'y': [], 'z': {}} | tojson(indent=2)",
    "{'x': [1]} | tojson(indent='--')",
    "{'x': [1]} | tojson(indent=0)",
    "{'x': [1]} | tojson(indent=none)",
    r"{'é': '😀\x7f\x00\u2028\"\\\b\f'} | tojson(ensure_ascii=true)",
    r"{'é': '😀\x7f\x00\u2028\"\\\b\f/'} | tojson(ensure_ascii=False)",
    "{'b': 1, 'a': {'d': 1, 'c': 2}} | tojson(sort_keys=true)",
    "{'a': [1, 2], 'b': 3} | tojson(separators=(',', ':'))",
    "{'a': [1, 2]} | tojson(indent=1, separators=(';', '=')) ~ [1, 2] | tojson(false, none, (',', ':'))",
    "{1: 2, none: 4, 1.5: 5} | tojson ~ {false: 1} | tojson",
    "('a', 1) | tojson ~ 'x' | tojson ~ none | tojson ~ true | tojson",
    "missing | tojson",
    "[1] | tojson(nonsense=1)",
    # Filters.
    "missing | length ~ '' | length ~ {'a': 1} | length ~ 'né' | count",
    "none | length",
    "3 | length",
    "missing | default('d') ~ none | default('d') ~ '' | default('d', true) ~ 0 | d(1, boolean=true)",
    "' a ' | trim ~ 'xax' | trim('x') ~ 5 | trim ~ none | trim",
    "'aXa' | replace('a', 'b') ~ 'aaa' | replace('a', 'b', 2) ~ 5 | replace(5, 6)",
    "['b', 'A', 'c'] | sort | join(',') ~ [3, 1] | sort(reverse=true) | join ~ ['b', 'a'] | sort(case_sensitive=true) | list",
    "{'b': 1, 'A': 2} | dictsort ~ {'b': 1, 'a': 2} | dictsort(by='value') ~ {'b': 1, 'a': 2} | dictsort(reverse=true)",
    "[1, 2, 3, 4] | select('odd') | list ~ [1, 2] | reject('equalto', 1) | list ~ ['a', ''] | select | list",
    "[{'a': 1}, {'a': 2}, {}] | selectattr('a', 'defined') | list ~ [{'a': 1}, {'a': 2}] | rejectattr('a', 'equalto', 1) | list",
    "[{'a': {'b': 1}}, {'a': {'b': 2}}] | map(attribute='a.b') | join('+') ~ ['a', 'b'] | map('upper') | list",
    "[{'a': 1}, {}] | map(attribute='a', default='x') | list",
    "['a', 'b'] | join(', ') ~ [{'n': 'x'}, {'n': 'y'}] | join('-', attribute='n') ~ 'abc' | join('.')",
    "[3, 1, 2] | max ~ [3, 1, 2] | min ~ [1, 2, 3] | sum ~ [{'a': 1}, {'a': 2}] | sum(attribute='a')",
    "[1, 2, 3] | first ~ [1, 2, 3] | last ~ 'abc' | first ~ ([] | first is defined)",
    "['a', 'A', 'b'] | unique | list ~ [1, 2, 3] | reverse | list ~ 'abc' | reverse ~ 'abc' | list",
    "[1, 2, 3, 4, 5] | batch(2) | list ~ [1, 2, 3, 4, 5] | slice(2) | list",
    "[{'k': 'b', 'v': 1}, {'k': 'a', 'v': 2}, {'k': 'b', 'v': 3}] | groupby('k') | map('last') | map('length') | list",
    "'hello World' | title ~ 'aB c' | capitalize ~ 'x' | upper ~ 'X' | lower ~ none | upper",
    r"'a\nb\n\nc' | indent(2) ~ 'a\nb' | indent(2, first=true) ~ 'a\n\nb' | indent(1, blank=true)",
    "{'a': 1} | items | list ~ missing | items | list",
    "[1] | nonsense",
    "{'a': 1} | string ~ 1.0 | string ~ none | string ~ missing | string ~ [1e-9] | string",
    "'<b>' | safe ~ '&'",
    # Tests.
    "('a' is sequence) ~ ({} is sequence) ~ ([] is sequence) ~ ((1,) is sequence) ~ (1 is sequence) ~ (none is sequence)"
    " ~ (missing is sequence) ~ ([1, 2][1:] is sequence)",
    "('a' is iterable) ~ ({} is iterable) ~ (none is iterable) ~ (1 is iterable) ~ (missing is iterable)",
    "(none is iterable and none | length > 0) ~ (missing is iterable and missing | length > 0)",
    "({} is mapping) ~ ([] is mapping) ~ (1 is number) ~ (true is number) ~ (1 is integer) ~ (true is integer) ~ (1.0 is float)",
    "(1 is boolean) ~ (true is boolean) ~ (true is true) ~ (1 is true) ~ (false is false) ~ (0 is false) ~ (none is none)",
    "('a' is string) ~ (1 is string) ~ (missing is undefined) ~ (none is defined) ~ (missing.x is defined if false else 1)",
    "missing.x is defined",
    "(3 is odd) ~ (4 is even) ~ (6 is divisibleby(3)) ~ (1 is eq 1) ~ (1 is lt 2) ~ (1 is in [1]) ~ (1 is sameas 1)",
    "('a' is lower) ~ ('A' is upper) ~ ('range' is filter) ~ ('upper' is filter) ~ ('odd' is test)",
    "range is callable",
    "1 is nonsense",
    # Operators and literals.
    "missing == none", "missing ~ 'x'", "missing or 'x'", "missing + 'x'", "none ~ 'x'", "'a' if false", "not missing",
    "[1, 2] + [3]", "[1] * 2", "{'a': 1} == {'a': 1}", "1 < 2 < 3", "'a' < 'b'", "1 in [1] and 2 not in [1]",
    "'a' 'b'", "1_000 ~ 0x10 ~ 1e3", r"'\u00e9\x41\n\'' ~ \"\\\"\"", "'a' in missing", "1 if missing else 2",
    "range(3) | list ~ range(1, 7, 2) | list ~ range(3, 0, -1) | list",
    "dict(a=1, b=2)", "namespace(a=1).a", "[x for x in [1]]",
    "none.x", "none['x']", "(1).x is defined", "missing.x", "[1][3] is defined", "{}['x'] is defined",
    "raise_exception('no')",
]

# Whole templates.
SOURCES = [
    "a\r\n{% if true %}\r\nb\r{% endif %}\r\n{{ 'c' }}\r\n",
    "{{ 'x\r\ny' }}|{{ 'x\\r\\ny' }}",
    "a\n",
    "a\n\n",
    "  {% if true %}\n  b\n  {% endif %}\n  {{ 1 }}\n  {# c #}\n d",
    "a {%- if true %} b {%- endif -%} c",
    "a {%+ if true %} b{% endif +%}\nc",
    "  {{- 1 -}}  x  {#- c -#}  y",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1, 2, 3] if i != 2 %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% else %}none{% endfor %}",
    "{% for i in [] %}x{% else %}none{% endfor %}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
    "{% for i in [1, 2, 3] %}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{{ loop.revindex }} {% endfor %}",
    "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{{ loop.depth }}{% endfor %}",
    "{% for c in 'héy' %}{{ c }}.{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}{% for x in missing %}x{% endfor %}",
    "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}",
    "{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
    "{% set x %}a{{ 1 }}{% endset %}[{{ x }}]{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set y | upper %}q{% endset %}{{ y }}",
    "{% macro m(a, b='d') -%} {{ a }}{{ b }} {%- endmacro %}{{ m(1) }}{{ m(b=2, a=3) }}{{ m() }}{{ m(1) | upper }}",
    "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{% endcall %}",
    "{% filter upper %}ab{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}{{ a }}",
    "{% raw %}{{ x }}{% endraw %}{# {{ x }} #}",
    "{% generation %}a{% endgeneration %} {%- generation -%} b {%- endgeneration -%} c",
    "{% for m in [1, 2] %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}",
    "{% set x = '<b>' | e %}{{ x }}{{ '<' ~ x }}",
    "{{ messages }}{{ tools }}",
    "{{ schema }} {{ schema.default }} {{ schema.default ~ '!' }} {{ schema.list | join('|') }} {{ schema | tojson }}",
    "{{ schema.default is number }}{{ schema.default is float }}{{ schema.default is string }}{{ schema.n is integer }}",
    "{{ schema.default if schema.default }} {{ schema.default | string | length }} {{ schema.default | tojson }}",
    "{% if x is not defined %}{% set x = false %}{% endif %}{{ x }}{{ not x }}",
    "{% set items = [] %}{% for i in [1, 2] %}{% set items = items + [i] %}{{ items }}{% endfor %}{{ items }}",
    "{% for a in [[1, [2]], [3, []]] recursive %}{{ a[0] }}{% endfor %}",
    "{% do 1 %}",
    "{% include 'x' %}",
    "{% block b %}x{% endblock %}",
    "{{ strftime_now('%%') }}",
    "{{ 1",
    "{% if 1 %}",
]

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The <weather> of a place: \"now\", é",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "City", "enum": ["Bern", "Rome"]},
                "tolerance": {"type": "number", "default": 1e-7, "maximum": 1e16},
                "items": {"type": "array", "items": {"type": "string"}},
                "any": {},
            },
            "required": ["place"],
        },
    },
}
CALL = {
    "type": "function",
    "id": "call_1",
    "function": {"name": "get_weather", "arguments": {"place": "Bern", "tolerance": 1e-7, "items": ["a", 2], "deep": True}},
}


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


HELLO = [turn("user", "Hi ")]
LONG = [
    turn("system", "Be brief.\n"),
    turn("user", "2+2?"),
    turn("assistant", " 4 "),
    turn("user", "<b> & 'é'\n"),
]
THOUGHT = [
    turn("user", "a"),
    turn("assistant", "b", reasoning_content="why\n"),
    turn("user", "c"),
    turn("assistant", "d", reasoning_content="\nbecause"),
]
WEATHER = [
    turn("user", "Weather?"),
    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "look"},
    turn("tool", '{"t": 3}', tool_call_id="call_1"),
]
# As OpenAI's clients send them.
CALLED = [
    turn("user", "Weather?"),
    turn("assistant", None, tool_calls=[
        {"id": f"call1234{n}", "type": "function", "function": {"name": "get_weather", "arguments": '{"place":"%s","deep":1e-7,"é":[1, 2.50]}' % place}}
        for n, place in enumerate(["Bern", "Rome"])
    ]),
    turn("tool", "3 °C", tool_call_id="call12340"),
    turn("tool", '{"t": 9}', tool_call_id="call12341"),
    turn("assistant", "3 and 9."),
    turn("user", "And now?"),
]
# Templates that print arguments get the text; all others the dictionary that it says.
PRINTED = ["printed"]
OPENED = [turn("assistant", "Welcome"), turn("user", "Hi")]


def goes_on(text, **fields):
    return [turn("user", "hi"), turn("assistant", text, **fields)]


# Template, messages, variables, how it ends.
CONVERSATIONS = [
    *[(name, messages, {}, ending) for name in ["chatml", "llama2", "llama3", "zephyr", "thinking", "tools"]
      for messages in [HELLO, LONG, OPENED] for ending in ["prompt", "closed"]],
    *[("thinking", [turn("user", "a"), turn("assistant", "<think>h</think>\nb"), turn("user", "c")], {}, "prompt")],
    *[(name, goes_on(text), {}, "open") for name in ["chatml", "llama2", "llama3", "zephyr", "tools"]
      for text in ["<", "|", "end", "i", "Sure: ", "  Sure:\n\n", "</s>", "assistant", "a b a b"]],
    ("tools", goes_on("<", reasoning_content="r"), {}, "open"),
    ("chatml", goes_on(""), {}, "open"),
    ("tools", goes_on(""), {}, "open"),
    ("chatml", [*goes_on("a"), turn("user", "b"), turn("assistant", "a")], {}, "open"),
    ("parts", [turn("user", parts("one", "two")), turn("assistant", parts("three"))], {}, "closed"),
    ("parts", [turn("user", parts("one")), turn("assistant", parts("a", "<"))], {}, "open"),
    ("tools", [turn("user", parts("one", "two"))], {}, "prompt"),
    ("tools", THOUGHT, {}, "closed"),
    ("tools", THOUGHT[:3], {"enable_thinking": False}, "prompt"),
    ("tools", [turn("system", " s "), *WEATHER], {"tools": [TOOL, TOOL]}, "prompt"),
    ("tools", WEATHER, {"tools": [TOOL]}, "prompt"),
    ("tools", WEATHER, {}, "closed"),
    *[(name, CALLED[:n], {"tools": [TOOL]}, "prompt") for name in ["tools", "nine"] for n in [2, 3, 4, 6]],
    *[("printed", CALLED[:n], {}, "prompt") for n in [2, 4, 6]],
    ("llama3", HELLO, {"tools": [TOOL], "date_string": "1 May"}, "prompt"),
    ("chatml", [turn("user", "Hi", name="Ann")], {"enable_thinking": False}, "prompt"),
]


def tokenizer():
    """Chat templates are rendered by a tokenizer; of this one only the special tokens matter."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def as_read(name, messages):
    """What transformers' users give a template: clients send the arguments of calls as texts."""
    if name in PRINTED:
        return messages
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls") or []:
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


def rendered(source, messages, ending, **variables):
    """The text, or None where the template or transformers refuses."""
    refusals = (jinja2.TemplateError, TypeError, ValueError, ZeroDivisionError, IndexError, AttributeError)
    try:
        return tokenizer().apply_chat_template(
            messages,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=ending == "prompt",
            continue_final_message=ending == "open",
            **variables,
        )
    except refusals:
        return None


def main():
    sources = ["{{ %s }}" % expression for expression in EXPRESSIONS] + SOURCES
    made = {
        "made_with": f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}",
        "templates": [{"source": source, "text": rendered(source, HELLO, "closed", schema=SCHEMA)} for source in sources],
        "conversations": [
            {"template": name, "messages": messages, "variables": variables, "ending": ending,
             "text": rendered((FIXTURES / f"{name}.jinja").read_text(), as_read(name, messages), ending, **variables)}
            for name, messages, variables, ending in CONVERSATIONS
        ],
    }
    text = json.dumps(made, ensure_ascii=False, indent=1)
    (FIXTURES / "python.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
