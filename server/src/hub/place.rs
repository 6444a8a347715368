//! Which hub, which cache and whose token: the variables of huggingface_hub, with its meanings.

use std::path::PathBuf;

pub struct Place {
    /// Without a slash at the end.
    pub endpoint: String,
    /// Never logged.
    pub token: Option<String>,
    /// The folder of `models--ORG--NAME` folders.
    pub cache: PathBuf,
    pub is_offline: bool,
}

impl Place {
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Place {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let is_on = |name: &str| {
            let on = ["1", "ON", "YES", "TRUE"];
            set(name).is_some_and(|value| on.contains(&value.trim().to_uppercase().as_str()))
        };
        let home = set("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let caches = set("XDG_CACHE_HOME").map(PathBuf::from);
            let own = || PathBuf::from(set("HOME").unwrap_or_else(|| ".".to_owned())).join(".cache");
            caches.unwrap_or_else(own).join("huggingface")
        });
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        // Where `hf auth login` leaves it.
        let login = || {
            let path = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            std::fs::read_to_string(path).ok()
        };
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| (!is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN")).then(login).flatten());
        Place {
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            token: token
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            cache: cache.map_or_else(|| home.join("hub"), PathBuf::from),
            is_offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_mean_what_they_mean_to_huggingface_hub() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        for (variables, cache, endpoint, token, is_offline) in [
            (
                &[("HOME", "/h")][..],
                "/h/.cache/huggingface/hub",
                "https://huggingface.co",
                None,
                false,
            ),
            (
                &[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")],
                "/x/huggingface/hub",
                "https://huggingface.co",
                None,
                false,
            ),
            (
                &[
                    ("HF_HOME", home),
                    ("HF_ENDPOINT", "http://h:1/"),
                    ("HF_HUB_OFFLINE", "true"),
                ],
                &format!("{home}/hub"),
                "http://h:1",
                Some("hf_file"),
                true,
            ),
            (
                &[
                    ("HF_HOME", home),
                    ("HF_HUB_CACHE", "/c"),
                    ("HF_TOKEN", " hf_own\n"),
                    ("HF_HUB_OFFLINE", "0"),
                ],
                "/c",
                "https://huggingface.co",
                Some("hf_own"),
                false,
            ),
        ] {
            let variable = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let place = Place::from_env(variable);
            assert_eq!(place.cache, PathBuf::from(cache), "{variables:?}");
            assert_eq!(place.endpoint, endpoint);
            assert_eq!((place.token.as_deref(), place.is_offline), (token, is_offline));
        }
    }
}
