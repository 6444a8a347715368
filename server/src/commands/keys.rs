//! `tandem keys`: keys of a data folder or a database, which a running server sees within moments.

use anyhow::{Context, Result, bail};
use tandem_store::{KeyRow, Keys, Limits, NewKey, Places};

use super::block_on;
use crate::app::now;
use crate::cli::{KeyCommand, KeyOptions, KeyPlace};
use crate::exit::WrongSetting;

const DAY_S: u64 = 24 * 3600;

pub fn run(options: KeyOptions) -> Result<()> {
    let KeyOptions { command } = options;
    block_on(async {
        match command {
            KeyCommand::Create {
                tenant,
                role,
                name,
                expires_days,
                requests_per_minute,
                tokens_per_minute,
                training_tokens_per_day,
                place,
            } => {
                let keys = open(&place).await?;
                let made = keys.create(NewKey {
                    name,
                    tenant,
                    role,
                    limits: Limits {
                        requests_per_minute,
                        tokens_per_minute,
                        training_tokens_per_day,
                    },
                    expires_after_s: expires_days.map(|days| u64::from(days) * DAY_S),
                });
                show(&made.await.context("no key was made")?);
            }
            KeyCommand::List { place } => {
                for row in open(&place).await?.list().await? {
                    println!("{}", line(&row));
                }
            }
            KeyCommand::Revoke { id, place } => {
                if !open(&place).await?.revoke(&id).await? {
                    bail!(WrongSetting(format!(
                        "there is no key {id} that was not revoked before"
                    )));
                }
                eprintln!("{id} opens nothing any more, on a running server within seconds");
            }
            KeyCommand::Rotate {
                id,
                overlap_seconds,
                place,
            } => match open(&place).await?.rotate(&id, overlap_seconds).await? {
                Some(made) => show(&made),
                None => bail!(WrongSetting(format!("there is no key {id} that opens anything"))),
            },
        }
        Ok(())
    })
}

async fn open(place: &KeyPlace) -> Result<Keys> {
    let KeyPlace {
        data_dir,
        database_url,
    } = place;
    let places = Places {
        database_url: database_url.clone(),
        ..Places::local(data_dir)
    };
    Keys::open(&places).await.context("the database")
}

/// The key alone goes to standard output, for scripts.
fn show((row, secret): &(KeyRow, String)) {
    eprintln!("{}", line(row));
    eprintln!("This is the only time that the key is shown:");
    println!("{secret}");
}

/// Columns by tabs: id, state, role, tenant, name, when it was made and when it ends (seconds since 1970), its limits.
fn line(row: &KeyRow) -> String {
    let KeyRow {
        id,
        hash: _,
        name,
        tenant,
        role,
        limits,
        created_at,
        expires_at,
        revoked_at,
    } = row;
    let Limits {
        requests_per_minute,
        tokens_per_minute,
        training_tokens_per_day,
    } = *limits;
    let limits = [
        (requests_per_minute.map(u64::from), "requests a minute"),
        (tokens_per_minute.map(u64::from), "tokens a minute"),
        (training_tokens_per_day, "training tokens a day"),
    ];
    let limits = limits
        .into_iter()
        .filter_map(|(limit, what)| Some(format!("{} {what}", limit?)));
    let limits = limits.collect::<Vec<_>>().join(", ");
    let state = match (revoked_at, row.opens(now())) {
        (Some(_), _) => "revoked",
        (None, true) => "active",
        (None, false) => "expired",
    };
    let end = expires_at.map_or_else(|| "never".to_owned(), |end| end.to_string());
    format!("{id}\t{state}\t{role}\t{tenant}\t{name}\t{created_at}\t{end}\t{limits}")
}
