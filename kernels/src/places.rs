//! What one step tells all of its ops: tokens, positions, slots, block tables, how attention is cut. On the host they are
//! slices; where the device has kernels of ours they lie there too, in one buffer that is copied once, so that no op of no
//! layer copies anything.

use std::cell::{OnceCell, RefCell};
use std::ops::{Deref, Range};

use tch::{Device, Kind, Tensor};

use crate::attention::device::{Cut, CutThere};
use crate::attention::{CacheDtype, Heads, PagedSeq};
use crate::gpu::{self, told};

/// Integers that ops read, and the same on the device, if a step brought them there.
#[derive(Debug)]
pub struct Ints<'a> {
    here: &'a [i64],
    /// `[n]` int32
    there: OnceCell<Tensor>,
}

impl<'a> From<&'a [i64]> for Ints<'a> {
    fn from(here: &'a [i64]) -> Ints<'a> {
        Ints {
            here,
            there: OnceCell::new(),
        }
    }
}

impl<'a> From<&'a Vec<i64>> for Ints<'a> {
    fn from(here: &'a Vec<i64>) -> Ints<'a> {
        here.as_slice().into()
    }
}

impl Deref for Ints<'_> {
    type Target = [i64];

    fn deref(&self) -> &[i64] {
        self.here
    }
}

impl Ints<'_> {
    /// `[n]` int32 on `device`, where they are always asked for: copied now where no step brought them.
    pub(crate) fn on(&self, device: Device) -> Tensor {
        let copy = || {
            let mut staging = Staging::default();
            let all = staging.add(self.here.iter().copied());
            staging.send(device).part(&all)
        };
        self.there.get_or_init(copy).shallow_clone()
    }
}

/// The sequences of a step as the layers of one group find them: where their keys and values stand.
#[derive(Debug)]
pub struct PagedGroup<'a> {
    /// `[T]` where each row's key and value go: block * BLOCK_SIZE + offset.
    pub slots: Ints<'a>,
    pub seqs: Vec<PagedSeq<'a>>,
    there: Option<PagedThere>,
    /// Of the attention of its layers, where that is known before they ask.
    shapes: Vec<(Heads, CacheDtype)>,
    /// How attention was cut for heads of a shape, once for all layers.
    cuts: RefCell<Vec<((Heads, CacheDtype), CutThere)>>,
}

/// [`PagedGroup::seqs`] on the device, all int32.
#[derive(Debug)]
pub(crate) struct PagedThere {
    /// `[S, 5]`: first row, rows, positions (kv_len), the block its table begins with, where that stands in `tables`.
    pub seqs: Tensor,
    /// The tables one behind the other.
    pub tables: Tensor,
}

impl<'a> PagedGroup<'a> {
    /// Not on any device yet: as part of [`Places`] it will be.
    pub fn new(slots: impl Into<Ints<'a>>, seqs: Vec<PagedSeq<'a>>) -> PagedGroup<'a> {
        PagedGroup {
            slots: slots.into(),
            seqs,
            there: None,
            shapes: vec![],
            cuts: RefCell::default(),
        }
    }

    /// Its layers attend in these shapes: how that is cut goes to the device with the rest.
    pub fn attended(mut self, shapes: impl IntoIterator<Item = (Heads, CacheDtype)>) -> PagedGroup<'a> {
        self.shapes.extend(shapes);
        self
    }

    /// Calls `read` with the sequences on `device` and how attention of such heads is cut over it: made when the first layer
    /// asks, where no step brought it.
    pub(crate) fn with_cut<T>(
        &self,
        device: Device,
        heads: Heads,
        dtype: CacheDtype,
        read: impl FnOnce(&PagedThere, &CutThere) -> T,
    ) -> T {
        let of = (heads, dtype);
        let known = self.cuts.borrow().iter().any(|(known, _)| *known == of);
        if !known {
            let mut staging = Staging::default();
            let cut = staging.add_cut(Cut::new(&self.seqs, heads, dtype));
            let cut = cut.there(&staging.send(device));
            self.cuts.borrow_mut().push((of, cut));
        }
        let cuts = self.cuts.borrow();
        let (_, cut) = cuts.iter().find(|(known, _)| *known == of).expect("it was made");
        self.with_seqs(device, |there| read(there, cut))
    }

    /// Calls `read` with the sequences on `device`: copied now where no step brought them.
    pub(crate) fn with_seqs<T>(&self, device: Device, read: impl FnOnce(&PagedThere) -> T) -> T {
        match &self.there {
            Some(there) => read(there),
            None => {
                let mut staging = Staging::default();
                let places = staging.add_seqs(&self.seqs);
                read(&places.there(&staging.send(device)))
            }
        }
    }
}

/// Where the rows of a step stand, for all layers.
#[derive(Debug)]
pub struct Places<'a> {
    /// `[T]`
    pub positions: Ints<'a>,
    pub groups: Vec<PagedGroup<'a>>,
}

impl<'a> Places<'a> {
    /// Of rows of `tokens [T]`, brought to `device` with them where kernels of ours run there.
    pub fn new(
        device: Device,
        tokens: &[u32],
        positions: impl Into<Ints<'a>>,
        groups: Vec<PagedGroup<'a>>,
    ) -> Places<'a> {
        let mut places = Places {
            positions: positions.into(),
            groups,
        };
        if gpu::on(device).is_some() {
            places.bring(device, tokens);
        }
        places
    }

    fn bring(&mut self, device: Device, tokens: &[u32]) {
        let mut staging = Staging::default();
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let tokens = staging.add(ids.iter().copied());
        let positions = staging.add(self.positions.iter().copied());
        let places: Vec<(Range<usize>, SeqRanges, Vec<CutRanges>)> = self
            .groups
            .iter()
            .map(|group| {
                let slots = staging.add(group.slots.iter().copied());
                let seqs = staging.add_seqs(&group.seqs);
                let cut = |&(heads, dtype)| staging.add_cut(Cut::new(&group.seqs, heads, dtype));
                (slots, seqs, group.shapes.iter().map(cut).collect())
            })
            .collect();
        let sent = staging.send(device);
        // The embedding's lookup finds them.
        told::brought(ids, Kind::Int, device, sent.part(&tokens));
        self.positions.there = sent.part(&positions).into();
        for (group, (slots, seqs, cuts)) in self.groups.iter_mut().zip(places) {
            group.slots.there = sent.part(&slots).into();
            group.there = Some(seqs.there(&sent));
            let cuts = cuts.iter().map(|cut| cut.there(&sent));
            group.cuts = RefCell::new(group.shapes.iter().copied().zip(cuts).collect());
        }
    }
}

/// Arrays that go to a device in one copy.
#[derive(Default)]
struct Staging(Vec<i32>);

struct Sent(Tensor);

struct SeqRanges {
    seqs: Range<usize>,
    tables: Range<usize>,
}

struct CutRanges {
    tile: usize,
    n_items: usize,
    n_merges: usize,
    records: usize,
    items: Range<usize>,
    merges: Range<usize>,
}

impl Staging {
    fn add(&mut self, values: impl IntoIterator<Item = i64>) -> Range<usize> {
        let start = self.0.len();
        let narrow = |value: i64| i32::try_from(value).expect("a position, slot or block below 2^31");
        self.0.extend(values.into_iter().map(narrow));
        let end = self.0.len();
        // Each array begins where a load of 16 bytes may.
        self.0.resize(end.next_multiple_of(4), 0);
        start..end
    }

    fn add_seqs(&mut self, seqs: &[PagedSeq]) -> SeqRanges {
        let mut table = 0;
        let rows: Vec<[i64; 5]> = seqs
            .iter()
            .map(|seq| {
                let own = [seq.rows.start, seq.rows.len(), seq.kv_len, seq.first_block, table];
                table += seq.table.len();
                own.map(|n| n as i64)
            })
            .collect();
        SeqRanges {
            seqs: self.add(rows.into_iter().flatten()),
            tables: self.add(
                seqs.iter()
                    .flat_map(|seq| seq.table)
                    .map(|&block| i64::from(block)),
            ),
        }
    }

    fn add_cut(&mut self, cut: Cut) -> CutRanges {
        CutRanges {
            tile: cut.tile,
            n_items: cut.items.len(),
            n_merges: cut.merges.len(),
            records: cut.records,
            items: self.add(cut.items.into_iter().flatten()),
            merges: self.add(cut.merges.into_iter().flatten()),
        }
    }

    fn send(self, device: Device) -> Sent {
        Sent(told::send(&Tensor::from_slice(&self.0), device))
    }
}

impl Sent {
    fn part(&self, place: &Range<usize>) -> Tensor {
        self.0.narrow(0, place.start as i64, place.len() as i64)
    }
}

impl SeqRanges {
    fn there(&self, sent: &Sent) -> PagedThere {
        PagedThere {
            seqs: sent.part(&self.seqs),
            tables: sent.part(&self.tables),
        }
    }
}

impl CutRanges {
    fn there(&self, sent: &Sent) -> CutThere {
        CutThere {
            tile: self.tile,
            n_items: self.n_items,
            n_merges: self.n_merges,
            records: self.records,
            items: sent.part(&self.items),
            merges: sent.part(&self.merges),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Lanes, emulated};

    #[test]
    fn a_step_is_one_buffer_on_the_device() {
        let (positions, slots) = (vec![3, 4, 9], vec![64, 65, 7]);
        let seq = |rows: Range<usize>, table, first_block, kv_len| PagedSeq {
            rows,
            table,
            first_block,
            kv_len,
        };
        let group = || PagedGroup::new(&slots, vec![seq(0..2, &[2], 0, 5), seq(2..3, &[0, 5], 1, 40)]);
        let numbers = |tensor: &Tensor| Vec::<i32>::try_from(tensor).expect("integers");
        let told = |step: &Places| {
            let group = &step.groups[0];
            let seqs = group.with_seqs(Device::Cpu, |there| {
                [numbers(&there.seqs), numbers(&there.tables)]
            });
            (
                numbers(&step.positions.on(Device::Cpu)),
                numbers(&group.slots.on(Device::Cpu)),
                seqs,
            )
        };
        let brought = emulated(Lanes::Cdna, || {
            Places::new(Device::Cpu, &[7, 8, 9], &positions, vec![group()])
        });
        let stays = Places::new(Device::Cpu, &[7, 8, 9], &positions, vec![group()]);
        let storage = |tensor: &Tensor| tensor.data_ptr() as usize;
        let first = storage(brought.positions.there.get().expect("it was brought"));
        let second = storage(brought.groups[0].slots.there.get().expect("it was brought"));
        assert_eq!(second - first, 16, "one buffer, in steps of 16 bytes");
        assert!(stays.positions.there.get().is_none());
        let want = (
            vec![3, 4, 9],
            vec![64, 65, 7],
            [vec![0, 2, 5, 0, 0, 2, 1, 40, 1, 1], vec![2, 0, 5]],
        );
        assert_eq!(told(&brought), want);
        assert_eq!(told(&stays), want);
    }
}
