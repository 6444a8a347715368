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
                stored_bytes,
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
                        stored_bytes,
                    },
                    expires_after_s: expires_days.map(|days| u64::from(days) * DAY_S),
                });
                show(&keys, &made.await.context("no key was made")?).await?;
            }
            KeyCommand::List { place } => {
                let keys = open(&place).await?;
                for row in keys.list().await? {
                    say!("{}", line(&keys, &row).await?);
                }
            }
            KeyCommand::Revoke { id, place } => {
                if !open(&place).await?.revoke(&id).await? {
                    bail!(WrongSetting(format!(
                        "there is no key {id} that was not revoked before"
                    )));
                }
                note!("{id} opens nothing any more, on a running server within seconds");
            }
            KeyCommand::Rotate {
                id,
                overlap_seconds,
                place,
            } => {
                let keys = open(&place).await?;
                match keys.rotate(&id, overlap_seconds).await? {
                    Some(made) => show(&keys, &made).await?,
                    None => bail!(WrongSetting(format!("there is no key {id} that opens anything"))),
                }
            }
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
async fn show(keys: &Keys, (row, secret): &(KeyRow, String)) -> Result<()> {
    note!("{}", line(keys, row).await?);
    note!("This is the only time that the key is shown:");
    say!("{secret}");
    Ok(())
}

/// Columns by tabs: id, state, role, tenant, name, when it was made and when it ends (seconds since 1970), its limits, with
/// what its tenant stores.
async fn line(keys: &Keys, row: &KeyRow) -> Result<String> {
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
        stored_bytes,
    } = *limits;
    let stored = match stored_bytes {
        None => None,
        Some(limit) => Some(format!("{} of {limit} bytes stored", keys.stored(tenant).await?)),
    };
    let limits = [
        (requests_per_minute.map(u64::from), "requests a minute"),
        (tokens_per_minute.map(u64::from), "tokens a minute"),
        (training_tokens_per_day, "training tokens a day"),
    ];
    let limits = limits
        .into_iter()
        .filter_map(|(limit, what)| Some(format!("{} {what}", limit?)));
    let limits = limits.chain(stored).collect::<Vec<_>>().join(", ");
    let state = match (revoked_at, row.opens(now())) {
        (Some(_), _) => "revoked",
        (None, true) => "active",
        (None, false) => "expired",
    };
    let end = expires_at.map_or_else(|| "never".to_owned(), |end| end.to_string());
    Ok(format!(
        "{id}\t{state}\t{role}\t{tenant}\t{name}\t{created_at}\t{end}\t{limits}"
    ))
}
