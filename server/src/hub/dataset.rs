//! Which files of a data set's repository are the rows of a split: by the `configs` of its README.md, else by the names of its
//! files and folders, as the `datasets` library has it. Not here: how files come, how rows are read.

use serde_norway::Value;

/// Files of each split, in the library's order: train, validation, test, then by name.
pub type Splits = Vec<(String, Vec<String>)>;

/// Ends of files that are read.
const READ: [&str; 7] = ["jsonl", "json", "ndjson", "csv", "tsv", "parquet", "txt"];
/// Said of a repository, not rows of it.
const ABOUT: [&str; 5] = [
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
];
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// The splits of a part (`config`) of a repository with these files. Errors continue "it cannot be used: ".
pub fn splits(files: &[String], readme: Option<&str>, config: Option<&str>) -> Result<Splits, String> {
    let mut rows: Vec<&str> = files
        .iter()
        .map(String::as_str)
        .filter(|file| is_data(file))
        .collect();
    rows.sort_unstable();
    let configs = readme.map(configs).unwrap_or_default();
    let found = match chosen(&configs, config)? {
        Some(chosen) => of_config(chosen, &rows)?,
        None => by_names(&rows, ""),
    };
    let found: Splits = found
        .into_iter()
        .map(|(split, files)| (split, of_one_format(files)))
        .collect();
    match found.iter().all(|(_, files)| files.is_empty()) {
        false => Ok(found),
        true => Err(format!(
            "it has no files of rows among those that are read ({}); {}",
            READ.join(", "),
            "datasets.load_dataset(...).to_json(\"rows.jsonl\") makes one"
        )),
    }
}

/// Of the branch that the hub keeps of data sets in other formats: `CONFIG/SPLIT/0000.parquet`.
pub fn converted(files: &[String], config: Option<&str>) -> Result<Splits, String> {
    let mut configs: Vec<&str> = vec![];
    let mut found: Vec<(&str, &str, &str)> = vec![];
    for file in files.iter().filter(|file| file.ends_with(".parquet")) {
        if let [config, split, _] = file.split('/').collect::<Vec<_>>()[..] {
            found.push((config, split.trim_start_matches("partial-"), file));
            if !configs.contains(&config) {
                configs.push(config);
            }
        }
    }
    let config = match (config, configs.as_slice()) {
        (Some(config), _) if configs.contains(&config) => config,
        (None, [only]) => only,
        (None, _) if configs.contains(&"default") => "default",
        (config, _) => return Err(which(config, &configs)),
    };
    found.retain(|(of, ..)| *of == config);
    found.sort_unstable();
    let mut splits: Splits = vec![];
    for (_, split, file) in found {
        match splits.iter_mut().find(|(known, _)| known == split) {
            Some((_, files)) => files.push(file.to_owned()),
            None => splits.push((split.to_owned(), vec![file.to_owned()])),
        }
    }
    Ok(splits)
}

/// The files of a split. The error says which there are.
pub fn files_of(splits: Splits, split: &str) -> Result<Vec<String>, String> {
    let names: Vec<String> = splits.iter().map(|(name, _)| name.clone()).collect();
    let found = splits
        .into_iter()
        .find(|(name, files)| name == split && !files.is_empty());
    match found {
        Some((_, files)) => Ok(files),
        None => Err(format!(
            "it has no split {split}, its splits are {}",
            names.join(", ")
        )),
    }
}

fn which(config: Option<&str>, known: &[&str]) -> String {
    let known = known.join(", ");
    match config {
        Some(config) => {
            format!("it has no part {config:?}, its parts are {known}: give one as dataset_config")
        }
        None => format!("it has several parts, {known}: give one as dataset_config"),
    }
}

fn is_data(file: &str) -> bool {
    let name = file.rsplit('/').next().unwrap_or(file);
    let is_hidden = file.split('/').any(|part| part.starts_with('.'));
    let is_special = file
        .split('/')
        .rev()
        .skip(1)
        .any(|folder| folder.starts_with("__"));
    !is_hidden && !is_special && !ABOUT.contains(&name) && READ.contains(&end(name))
}

fn end(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, end)| end)
}

/// One format is read of a split: the one that most of its files have.
fn of_one_format(files: Vec<String>) -> Vec<String> {
    let format = |file: &String| match end(file) {
        "jsonl" | "ndjson" => "json".to_owned(),
        "tsv" => "csv".to_owned(),
        end => end.to_owned(),
    };
    let count = |of: &String| files.iter().filter(|file| format(file) == *of).count();
    let mut formats: Vec<String> = files.iter().map(format).collect();
    formats.sort();
    formats.dedup();
    match formats.iter().max_by_key(|format| count(format)) {
        Some(most) => files
            .iter()
            .filter(|file| format(file) == *most)
            .cloned()
            .collect(),
        None => files,
    }
}

/// What the header of a README.md says of its parts.
fn configs(readme: &str) -> Vec<Value> {
    let header = readme
        .strip_prefix("---\n")
        .and_then(|rest| rest.split_once("\n---"));
    let read = header.and_then(|(header, _)| serde_norway::from_str::<Value>(header).ok());
    let configs = read.and_then(|about| about.get("configs").cloned());
    match configs {
        Some(Value::Sequence(configs)) => configs,
        _ => vec![],
    }
}

fn name_of(config: &Value) -> &str {
    config
        .get("config_name")
        .and_then(Value::as_str)
        .unwrap_or("default")
}

/// `None`: the names of files say it.
fn chosen<'a>(configs: &'a [Value], asked: Option<&str>) -> Result<Option<&'a Value>, String> {
    let names: Vec<&str> = configs.iter().map(name_of).collect();
    let is_default = |config: &&Value| {
        config.get("default").and_then(Value::as_bool) == Some(true) || name_of(config) == "default"
    };
    match (asked, configs) {
        (None | Some("default"), []) => Ok(None),
        (Some(asked), configs) => match configs.iter().find(|config| name_of(config) == asked) {
            Some(config) => Ok(Some(config)),
            None if configs.is_empty() => Err(which(Some(asked), &["default"])),
            None => Err(which(Some(asked), &names)),
        },
        (None, [only]) => Ok(Some(only)),
        (None, configs) => match configs.iter().find(is_default) {
            Some(config) => Ok(Some(config)),
            None => Err(which(None, &names)),
        },
    }
}

fn of_config(config: &Value, rows: &[&str]) -> Result<Splits, String> {
    let folder = config.get("data_dir").and_then(Value::as_str).unwrap_or_default();
    let folder = match folder.trim_matches(['.', '/']) {
        "" => String::new(),
        folder => format!("{folder}/"),
    };
    let matching = |patterns: &Value| {
        let texts: Vec<&str> = match patterns {
            Value::String(one) => vec![one],
            Value::Sequence(several) => several.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        };
        let mut found: Vec<String> = vec![];
        for pattern in texts {
            let pattern = format!("{folder}{}", pattern.trim_start_matches("./"));
            let new = rows.iter().filter(|file| matches(&pattern, file));
            found.extend(new.map(|file| (*file).to_owned()));
        }
        found.dedup();
        found
    };
    let strange = || {
        format!(
            "its README.md has data_files of {} that are not understood",
            name_of(config)
        )
    };
    match config.get("data_files") {
        None => Ok(by_names(rows, &folder)),
        Some(Value::Sequence(entries)) if entries.iter().any(Value::is_mapping) => entries
            .iter()
            .map(
                |entry| match (entry.get("split").and_then(Value::as_str), entry.get("path")) {
                    (Some(split), Some(path)) => Ok((split.to_owned(), matching(path))),
                    _ => Err(strange()),
                },
            )
            .collect(),
        Some(Value::Mapping(splits)) => splits
            .iter()
            .map(|(split, path)| Ok((split.as_str().ok_or_else(strange)?.to_owned(), matching(path))))
            .collect(),
        Some(patterns) => Ok(vec![("train".to_owned(), matching(patterns))]),
    }
}

/// `data/train-00000-of-00002.parquet`, else keywords in folders, else keywords in names, else all of it is train.
fn by_names(rows: &[&str], folder: &str) -> Splits {
    let within: Vec<(&str, &str)> = rows
        .iter()
        .filter_map(|file| Some((*file, file.strip_prefix(folder)?)))
        .collect();
    let mut sharded: Splits = vec![];
    for (file, inner) in &within {
        let Some(split) = inner.strip_prefix("data/").and_then(shard_of) else {
            continue;
        };
        match sharded.iter_mut().find(|(known, _)| known == split) {
            Some((_, files)) => files.push((*file).to_owned()),
            None => sharded.push((split.to_owned(), vec![(*file).to_owned()])),
        }
    }
    if !sharded.is_empty() {
        let place = |split: &str| {
            KEYWORDS
                .iter()
                .position(|(known, _)| *known == split)
                .unwrap_or(KEYWORDS.len())
        };
        sharded.sort_by(|(a, _), (b, _)| (place(a), a).cmp(&(place(b), b)));
        return sharded;
    }
    let by = |is_of: &dyn Fn(&str, &str) -> bool| -> Splits {
        let of = |keywords: &[&str]| -> Vec<String> {
            let found = within
                .iter()
                .filter(|(_, inner)| keywords.iter().any(|keyword| is_of(inner, keyword)));
            found.map(|(file, _)| (*file).to_owned()).collect()
        };
        let splits = KEYWORDS
            .iter()
            .map(|(split, keywords)| ((*split).to_owned(), of(keywords)));
        splits.filter(|(_, files)| !files.is_empty()).collect()
    };
    let in_folder = |inner: &str, keyword: &str| {
        inner
            .split('/')
            .rev()
            .skip(1)
            .any(|part| has_word(part, keyword, true))
    };
    let in_name = |inner: &str, keyword: &str| {
        inner
            .rsplit('/')
            .next()
            .is_some_and(|name| has_word(name, keyword, false))
    };
    let splits = by(&in_folder);
    let splits = if splits.is_empty() { by(&in_name) } else { splits };
    match splits.is_empty() {
        false => splits,
        true => vec![(
            "train".to_owned(),
            within.iter().map(|(file, _)| (*file).to_owned()).collect(),
        )],
    }
}

/// `train` of `train-00000-of-00002-abc.parquet`.
fn shard_of(name: &str) -> Option<&str> {
    let (head, tail) = name.split_once("-of-")?;
    let (split, number) = head.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    (!name.contains('/') && is_number(number) && is_number(tail.get(..5)?) && tail.contains('.'))
        .then_some(split)
}

/// Does the keyword stand in it as a word? At the end of a folder's name it may; a file's name goes on.
fn has_word(text: &str, keyword: &str, may_end: bool) -> bool {
    let parts = |byte: u8| b"-._ ".contains(&byte) || byte.is_ascii_digit();
    text.match_indices(keyword).any(|(at, _)| {
        let bytes = text.as_bytes();
        let begins = at == 0 || parts(bytes[at - 1]);
        begins && bytes.get(at + keyword.len()).map_or(may_end, |&byte| parts(byte))
    })
}

/// A pattern of fsspec: `*` and `?` stay within a folder, `**` goes through, `[0-9]` is one of these.
fn matches(pattern: &str, path: &str) -> bool {
    fn go(pattern: &[u8], path: &[u8]) -> bool {
        match pattern {
            [] => path.is_empty(),
            [b'*', b'*', b'/', rest @ ..] => {
                go(rest, path) || (0..path.len()).any(|at| path[at] == b'/' && go(rest, &path[at + 1..]))
            }
            [b'*', b'*', rest @ ..] => (0..=path.len()).any(|at| go(rest, &path[at..])),
            [b'*', rest @ ..] => {
                let here = path.iter().position(|&byte| byte == b'/').unwrap_or(path.len());
                (0..=here).any(|at| go(rest, &path[at..]))
            }
            [b'?', rest @ ..] => matches!(path, [byte, more @ ..] if *byte != b'/' && go(rest, more)),
            [b'[', rest @ ..] => {
                let Some(end) = rest.iter().position(|&byte| byte == b']') else {
                    return matches!(path, [b'[', more @ ..] if go(rest, more));
                };
                let (set, rest) = (&rest[..end], &rest[end + 1..]);
                matches!(path, [byte, more @ ..] if in_set(set, *byte) && go(rest, more))
            }
            [byte, rest @ ..] => matches!(path, [first, more @ ..] if first == byte && go(rest, more)),
        }
    }
    fn in_set(set: &[u8], byte: u8) -> bool {
        match set {
            [] => false,
            [low, b'-', high, rest @ ..] => (*low..=*high).contains(&byte) || in_set(rest, byte),
            [one, rest @ ..] => *one == byte || in_set(rest, byte),
        }
    }
    // A folder is all that is in it.
    go(pattern.as_bytes(), path.as_bytes())
        || go(
            format!("{}/**", pattern.trim_end_matches('/')).as_bytes(),
            path.as_bytes(),
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    /// What `datasets` read of folders: each file has one row, its own name.
    #[derive(Deserialize)]
    struct Repository {
        files: Vec<String>,
        readme: Option<String>,
        config: Option<String>,
        splits: std::collections::BTreeMap<String, Vec<String>>,
    }

    #[test]
    fn splits_are_those_of_datasets() {
        let made = include_str!("fixture/datasets.json");
        let repositories: Vec<Repository> = serde_json::from_str(made).expect("scripts/fixtures made it");
        assert!(repositories.len() >= 12);
        for of in repositories {
            let found = splits(&of.files, of.readme.as_deref(), of.config.as_deref()).expect("it has rows");
            let found: std::collections::BTreeMap<_, _> =
                found.into_iter().filter(|(_, files)| !files.is_empty()).collect();
            assert_eq!(found, of.splits, "{:?} {:?}", of.files, of.readme);
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        let files = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
        let readme = "---\nconfigs:\n- config_name: en\n  data_files: en.csv\n- config_name: de\n  data_files: de.csv\n---\n";
        for (names, readme, config, expected) in [
            ("README.md x.arrow", None, None, "no files of rows"),
            ("en.csv de.csv", Some(readme), None, "several parts, en, de"),
            (
                "en.csv de.csv",
                Some(readme),
                Some("fr"),
                "no part \"fr\", its parts are en, de",
            ),
        ] {
            let error = splits(&files(names), readme, config).expect_err("it is refused");
            assert!(error.contains(expected), "{error}");
        }
        let converted = |config| {
            converted(
                &files("a/train/0000.parquet a/partial-test/0000.parquet b/train/0000.parquet"),
                config,
            )
        };
        assert!(
            converted(None)
                .expect_err("two")
                .contains("give one as dataset_config")
        );
        let splits = converted(Some("a")).expect("it is there");
        assert_eq!(
            files_of(splits.clone(), "test"),
            Ok(vec!["a/partial-test/0000.parquet".to_owned()])
        );
        assert!(
            files_of(splits, "dev")
                .expect_err("none")
                .contains("its splits are test, train")
        );
    }
}
