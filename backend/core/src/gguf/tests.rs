//! Files that are right, in all types; and wrong ones, with the message that each gives.

use super::{Gguf, TensorInfo, Value, aligned, head, is_name, siblings};

/// A file of these keys and tensors: (key, type and bytes of the value), (name, dimensions, type, offset).
type Key<'a> = (&'a str, Vec<u8>);
type Tensor<'a> = (&'a str, &'a [u64], u32, u64);

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn value(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], bytes].concat()
}

fn list(kind: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
    let head = [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    value(9, &[&head[..], bytes].concat())
}

fn file(version: u32, keys: &[Key], tensors: &[Tensor]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        bytes.extend(text(key));
        bytes.extend(value);
    }
    for (name, dimensions, type_id, offset) in tensors {
        bytes.extend(text(name));
        bytes.extend((dimensions.len() as u32).to_le_bytes());
        bytes.extend(dimensions.iter().flat_map(|n| n.to_le_bytes()));
        bytes.extend(type_id.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes
}

fn read(bytes: &[u8]) -> Result<Gguf, String> {
    Gguf::read(bytes, bytes.len() as u64, "m.gguf").map_err(|error| error.to_string())
}

#[test]
fn every_type_of_value_is_read() {
    let eps = 1e-5f32;
    let keys = [
        ("a", value(0, &[200]), Value::Whole(200)),
        ("b", value(1, &[200]), Value::Whole(-56)),
        ("c", value(2, &60_000u16.to_le_bytes()), Value::Whole(60_000)),
        ("d", value(3, &(-2i16).to_le_bytes()), Value::Whole(-2)),
        ("e", value(4, &7u32.to_le_bytes()), Value::Whole(7)),
        ("f", value(5, &(-7i32).to_le_bytes()), Value::Whole(-7)),
        ("g", value(6, &eps.to_le_bytes()), Value::Float(1e-5)),
        ("h", value(7, &[1]), Value::Flag(true)),
        ("i", value(8, &text("é")), Value::Text("é".to_owned())),
        (
            "j",
            value(10, &u64::MAX.to_le_bytes()),
            Value::Whole(u64::MAX.into()),
        ),
        (
            "k",
            value(11, &i64::MIN.to_le_bytes()),
            Value::Whole(i64::MIN.into()),
        ),
        ("l", value(12, &0.1f64.to_le_bytes()), Value::Float(0.1)),
        (
            "m",
            list(8, 2, &[text("x"), text("")].concat()),
            Value::Texts(vec!["x".to_owned(), String::new()]),
        ),
        ("n", list(5, 1, &3i32.to_le_bytes()), Value::Wholes(vec![3])),
        ("o", list(6, 1, &eps.to_le_bytes()), Value::Floats(vec![eps])),
        ("p", list(7, 2, &[0, 1]), Value::Flags(vec![false, true])),
    ];
    let plain: Vec<Key> = keys.iter().map(|(key, bytes, _)| (*key, bytes.clone())).collect();
    let bytes = file(3, &plain, &[("t", &[4, 2], 8, 64)]);
    let gguf = read(&bytes).unwrap();
    for (key, _, expected) in keys {
        assert_eq!(gguf.metadata.get(key), Some(&expected), "{key}");
    }
    assert_eq!(gguf.tensors[0].shape, [2, 4]);
    assert_eq!(gguf.data_start, (bytes.len() as u64).next_multiple_of(32));
}

#[test]
fn wrong_files_say_what_is_wrong_and_where() {
    let whole = file(
        3,
        &[("general.name", value(8, &text("x")))],
        &[("t", &[32], 0, 0)],
    );
    let patched = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    let key = |value: Vec<u8>| file(3, &[("k", value)], &[]);
    let huge = u64::MAX.to_le_bytes();
    let alignment = |n: u32| file(3, &[("general.alignment", value(4, &n.to_le_bytes()))], &[]);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (
            b"version https://git-lfs.github.com/spec/v1".to_vec(),
            "git lfs pull",
        ),
        (vec![], "ends at byte 0 inside the magic number"),
        (
            b"PK\x03\x04____".to_vec(),
            "begins with the bytes [50, 4b, 03, 04]",
        ),
        (
            patched(4, &1u32.to_le_bytes()),
            "version 1 of the format; 2 and 3 are read",
        ),
        (patched(4, &3u32.to_be_bytes()), "big-endian"),
        (
            whole[..20].to_vec(),
            "inside the number of keys, which begins at byte 16",
        ),
        (
            patched(8, &huge),
            "18446744073709551615 tensors at byte 24 cannot fit",
        ),
        (
            patched(16, &huge),
            "18446744073709551615 keys at byte 24 cannot fit into the",
        ),
        (
            patched(24, &huge),
            "18446744073709551615 bytes of a key at byte 32 cannot fit",
        ),
        (
            file(3, &[("", value(7, &[0]))], &[]),
            "the key at byte 24 has 0 bytes",
        ),
        (key(value(8, &huge)), "`k`: 18446744073709551615 bytes of a text"),
        (
            key(value(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])),
            "`k`: a text is not UTF-8",
        ),
        (
            key(value(13, &[0])),
            "`k`: the type at byte 37 is 13; the format has the types 0 to 12",
        ),
        (key(list(9, 1, &[])), "`k`: a list of lists is not read"),
        (
            key(list(4, 1 << 62, &[])),
            "`k`: 4611686018427387904 items of a list",
        ),
        (
            key(list(8, 1 << 40, &[])),
            "items of a list at byte 49 cannot fit into the 0 bytes",
        ),
        (key(value(7, &[2])), "`k`: 2 is neither false (0) nor true (1)"),
        (
            file(3, &[("k", value(7, &[0])), ("k", value(7, &[0]))], &[]),
            "the key `k` is there twice",
        ),
        (
            alignment(0),
            "`general.alignment`: a power of two is needed (it is 0)",
        ),
        (alignment(48), "a power of two is needed (it is 48)"),
        (whole[..whole.len() - 4].to_vec(), "tensor `t`: the file ends"),
        (
            [file(3, &[], &[("t", &[], 0, 0)]), vec![0; 32]].concat(),
            "tensor `t`: it has 0 dimensions, from 1 to 4 are allowed",
        ),
        (file(3, &[], &[("t", &[1; 5], 0, 0)]), "it has 5 dimensions"),
        (file(3, &[], &[("t", &[0], 0, 0)]), "tensor `t`: a dimension is 0"),
        (
            file(3, &[], &[("t", &[1 << 40, 1 << 40], 0, 0)]),
            "more numbers than a file can hold",
        ),
        (
            file(3, &[], &[("t", &[1], 0, 8)]),
            "its offset 8 is not a multiple of the alignment 32",
        ),
        (
            file(3, &[], &[("t", &[1], 0, 0), ("t", &[1], 0, 32)]),
            "the tensor `t` is there twice",
        ),
    ];
    for (bytes, expected) in cases {
        let error = read(&bytes).expect_err(expected);
        assert!(
            error.contains(expected) && error.starts_with("m.gguf: "),
            "{error}\n{expected}"
        );
    }
    // Cut anywhere it is an error, never a panic.
    for end in 0..whole.len() {
        assert!(read(&whole[..end]).is_err(), "{end}");
    }
    read(&whole).unwrap();
}

#[test]
fn parts_are_found_by_the_first_ones_name() {
    assert!(is_name("x.gguf") && is_name("x.GGUF") && !is_name("gguf") && !is_name("x.gguf.part"));
    let cases: [(&str, Result<&[&str], &str>); 5] = [
        ("x.gguf", Ok(&["x.gguf"])),
        ("x-1-of-2.gguf", Ok(&["x-1-of-2.gguf"])),
        (
            "x-00001-of-00002.gguf",
            Ok(&["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]),
        ),
        (
            "x-00002-of-00002.gguf",
            Err("name the first, x-00001-of-00002.gguf"),
        ),
        ("x-00000-of-00000.gguf", Err("it is part 0 of 0")),
    ];
    for (name, expected) in cases {
        match (siblings(name), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
            (found, expected) => panic!("{found:?} {expected:?}"),
        }
    }
}

#[test]
fn what_is_written_is_read_back() {
    let values = [
        ("a", Value::Whole(7)),
        ("b", Value::Whole(1 << 40)),
        ("c", Value::Whole(-3)),
        ("d", Value::Float(1e-5)),
        ("e", Value::Flag(true)),
        ("f", Value::Text("é".to_owned())),
        ("g", Value::Wholes(vec![3, -1])),
        ("h", Value::Wholes(vec![1 << 40])),
        ("i", Value::Floats(vec![0.5, -1.0])),
        ("j", Value::Flags(vec![false, true])),
        ("k", Value::Texts(vec!["x".to_owned(), String::new()])),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    let tensor = |name: &str, shape: &[i64], type_id, offset| TensorInfo {
        name: name.to_owned(),
        shape: shape.to_vec(),
        type_id,
        offset,
    };
    let tensors = [tensor("t", &[3, 2], 0, 0), tensor("u", &[5], 30, aligned(24))];
    let bytes = head(&values, &tensors);
    let found = read(&bytes).unwrap();
    for (key, value) in &values {
        assert_eq!(found.metadata.get(key), Some(value), "{key}");
    }
    assert_eq!(found.tensors, tensors);
    assert_eq!(found.data_start, bytes.len() as u64);
}
