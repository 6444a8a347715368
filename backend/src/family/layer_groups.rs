//! Which attentions share blocks of the KV cache. Those that see alike are dealt into groups of as many layers each, so that
//! a block has room for a group's layers, whichever group it is. Not here: which blocks a group needs (core).

use std::collections::BTreeMap;

use tandem_core::blocks::Groups;
use tandem_kernels::attention::BLOCK_SIZE;

use super::DecoderSpec;

/// Layers without an attention that a group may have for each sixteen that the decoder has: fewer groups are less to account
/// for.
const SPARE: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerGroups {
    /// Layers of a group.
    pub layers: usize,
    /// Of each group, in tokens.
    pub windows: Vec<Option<usize>>,
    /// Of each attention, in order.
    pub places: Vec<CachePlace>,
}

/// Where an attention's keys and values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachePlace {
    pub group: usize,
    /// Of the group's.
    pub layer: usize,
}

impl LayerGroups {
    pub fn of(spec: &DecoderSpec) -> LayerGroups {
        let window = |window: i64| usize::try_from(window).unwrap_or(0).max(1);
        let windows: Vec<Option<usize>> = spec.attentions().map(|attn| attn.window.map(window)).collect();
        LayerGroups::new(&windows)
    }

    fn new(windows: &[Option<usize>]) -> LayerGroups {
        let mut kinds: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
        for (attention, window) in windows.iter().enumerate() {
            kinds.entry(*window).or_default().push(attention);
        }
        let counts = |kinds: &[&Vec<usize>]| -> Vec<usize> { kinds.iter().map(|kind| kind.len()).collect() };
        // Short sequences fill all groups, long ones those without a window.
        let all = counts(&kinds.values().collect::<Vec<_>>());
        let whole = counts(&kinds.get(&None).into_iter().collect::<Vec<_>>());
        let fits = |layers: &usize| {
            [&all, &whole].into_iter().all(|counts| {
                let given: usize = counts.iter().map(|n| n.next_multiple_of(*layers)).sum();
                let used: usize = counts.iter().sum();
                SPARE * (given - used) <= used
            })
        };
        let layers = (1..=windows.len())
            .rev()
            .find(fits)
            .expect("1 leaves nothing over");
        let mut groups = LayerGroups {
            layers,
            windows: vec![],
            places: vec![CachePlace { group: 0, layer: 0 }; windows.len()],
        };
        for (window, attentions) in kinds {
            for of_group in attentions.chunks(layers) {
                let group = groups.windows.len();
                groups.windows.push(window);
                for (layer, &attention) in of_group.iter().enumerate() {
                    groups.places[attention] = CachePlace { group, layer };
                }
            }
        }
        groups
    }

    /// For the scheduler, whose steps have at most `stride` tokens of a sequence.
    pub fn blocks(&self, stride: usize) -> Groups {
        Groups::new(BLOCK_SIZE, self.windows.clone(), stride)
    }

    /// For the log, where there is more than one group.
    pub fn shown(&self) -> Option<String> {
        let mut windows: Vec<String> = self.windows.iter().flatten().map(usize::to_string).collect();
        windows.dedup();
        if windows.is_empty() {
            return None;
        }
        let attentions = self.places.len();
        let spare = match self.layers * self.windows.len() - attentions {
            0 => String::new(),
            spare => format!(", room for {spare} unused"),
        };
        Some(format!(
            "{attentions} layers in groups of {}{spare}; {} of {} groups keep a window of {} tokens",
            self.layers,
            self.windows.iter().flatten().count(),
            self.windows.len(),
            windows.join(" or ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Patterns of Llama, Gemma 3 (1B, 4B, 27B), gpt-oss, and one that does not come out even.
    #[test]
    fn layers_that_see_alike_are_together_and_little_room_is_left_over() {
        let every = |n: usize, layers: usize| -> Vec<Option<usize>> {
            (1..=layers).map(|i| (i % n > 0).then_some(512)).collect()
        };
        for (windows, layers, n_groups) in [
            (vec![None; 30], 30, 1),
            (vec![Some(4096); 32], 32, 1),
            (every(6, 26), 2, 13),
            (every(6, 34), 5, 7),
            (every(6, 62), 5, 13),
            (every(2, 24), 12, 2),
            ([vec![None; 31], vec![Some(64)]].concat(), 2, 17),
        ] {
            let groups = LayerGroups::new(&windows);
            assert_eq!(
                (groups.layers, groups.windows.len()),
                (layers, n_groups),
                "{windows:?}"
            );
            let mut places: Vec<(usize, usize)> = groups.places.iter().map(|p| (p.group, p.layer)).collect();
            for (place, window) in groups.places.iter().zip(&windows) {
                assert!(groups.windows[place.group] == *window && place.layer < layers);
            }
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), windows.len(), "each has a place of its own");
        }
        assert_eq!(LayerGroups::new(&[None, None]).shown(), None);
        let shown = LayerGroups::new(&every(6, 34)).shown().unwrap();
        assert_eq!(
            shown,
            "34 layers in groups of 5, room for 1 unused; 6 of 7 groups keep a window of 512 tokens"
        );
    }
}
