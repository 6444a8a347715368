//! Brings files to their place: each once, several at a time, from where an interrupted download left off, and checked
//! against what the hub says of them. Not here: what is wanted, HTTP.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};

use super::cache::{Target, disk};
use super::client::{Client, Facts};
use super::progress::Progress;
use super::{HubError, client::Piece};

/// Files at once. One connection rarely has the whole line.
const AT_ONCE: usize = 4;
/// How often a transfer that brings nothing is begun again, with pauses that double.
const TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

pub async fn all(
    client: &Client<'_>,
    target: &Target<'_>,
    commit: &str,
    files: Vec<String>,
    progress: &Progress,
) -> Result<(), HubError> {
    let facts = async |file: String| Ok::<_, HubError>((client.facts(commit, &file).await?, file));
    let facts: Vec<(Facts, String)> = futures::stream::iter(files.into_iter().map(facts))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    let mut missing = Vec::new();
    for (facts, file) in facts {
        if !target.has(commit, &file, &facts)? {
            progress.expect(facts.size.unwrap_or(0));
            missing.push((facts, file));
        }
    }
    let one =
        async |(facts, file): (Facts, String)| one(client, target, commit, &file, &facts, progress).await;
    futures::stream::iter(missing.into_iter().map(one))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

async fn one(
    client: &Client<'_>,
    target: &Target<'_>,
    commit: &str,
    file: &str,
    facts: &Facts,
    progress: &Progress,
) -> Result<(), HubError> {
    let _lock = target.lock(file, facts).await?;
    // Who held the lock before may have brought it.
    if target.has(commit, file, facts)? {
        progress.has(facts.size.unwrap_or(0));
        return Ok(());
    }
    let part = target.part(file, facts)?;
    let (mut tries, mut pause) = (TRIES, FIRST_PAUSE);
    loop {
        let before = length(&part);
        match transfer(client, commit, file, facts, &part, progress).await {
            Ok(()) => break,
            Err(error) => {
                progress.lost(length(&part));
                if length(&part) > before {
                    (tries, pause) = (TRIES, FIRST_PAUSE);
                }
                if !error.may_pass() || tries == 0 {
                    return Err(error);
                }
                tracing::warn!(file, have = length(&part), %error, "the download broke off: it goes on from there");
                tokio::time::sleep(pause).await;
                (tries, pause) = (tries - 1, pause * 2);
            }
        }
    }
    check(client.name(), file, facts, &part)?;
    target.place(commit, file, facts, &part)
}

/// Appends what is missing.
async fn transfer(
    client: &Client<'_>,
    commit: &str,
    file: &str,
    facts: &Facts,
    part: &Path,
    progress: &Progress,
) -> Result<(), HubError> {
    let have = match length(part) {
        have if facts.size.is_some_and(|size| have > size) => 0,
        have => have,
    };
    let open = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(part);
    let mut output = open.map_err(disk(part))?;
    if have > 0 && facts.size == Some(have) {
        progress.has(have);
        return Ok(());
    }
    let Piece { mut body, start } = client.open(commit, file, have).await?;
    output.set_len(start).map_err(disk(part))?;
    std::io::Seek::seek(&mut output, std::io::SeekFrom::End(0)).map_err(disk(part))?;
    progress.has(start);
    while let Some(chunk) = client.next(&mut body).await? {
        output.write_all(&chunk).map_err(disk(part))?;
        progress.came(chunk.len() as u64);
    }
    match facts.size {
        Some(size) if length(part) != size => Err(HubError::Cut {
            file: file.to_owned(),
            got: length(part),
            size,
        }),
        _ => output.sync_all().map_err(disk(part)),
    }
}

fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |found| found.len())
}

/// Against the digest that the hub has of large files. What is damaged is removed, so that the next try begins anew.
fn check(name: &str, file: &str, facts: &Facts, part: &Path) -> Result<(), HubError> {
    let Some(expected) = facts.sha256() else {
        return Ok(());
    };
    let mut input = File::open(part).map_err(disk(part))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match input.read(&mut buffer).map_err(disk(part))? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    let digest = hasher.finalize();
    let got: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    if got == expected {
        return Ok(());
    }
    std::fs::remove_file(part).map_err(disk(part))?;
    Err(HubError::Damaged {
        name: name.to_owned(),
        file: file.to_owned(),
        expected: expected.to_owned(),
        got,
    })
}
