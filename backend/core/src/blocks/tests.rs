//! Histories of a pool, against its own audit.

use std::ops::Range;

use super::*;
use crate::rng;

fn chain(adapter: Option<AdapterDigest>, tokens: &[TokenId], block_size: usize) -> Vec<BlockHash> {
    let mut last = BlockHash::seed(adapter, None);
    let next = |block: &[TokenId]| {
        last = last.then(block);
        last
    };
    tokens.chunks_exact(block_size).map(next).collect()
}

#[test]
fn a_prefix_is_found_only_under_its_own_adapter_and_past() {
    let mut pool = BlockPool::new(8, Groups::one(2));
    let salts = [None, Some(Digest([1; 32])), Some(Digest([2; 32]))];
    for (i, one) in salts.iter().enumerate() {
        for other in &salts[..i] {
            assert_ne!(BlockHash::seed(None, *one), BlockHash::seed(None, *other));
            let adapter = Some(Digest([1; 32]));
            assert_ne!(BlockHash::seed(adapter, *one), BlockHash::seed(adapter, *other));
        }
    }
    let hashes = chain(None, &[1, 2, 3, 4], 2);
    let nothing = pool.lookup(&[]);
    let tables = pool.allocate(nothing, 4, 0).unwrap();
    (0..2).for_each(|block| pool.name(&tables, block, hashes[block]));
    let one = Some(Digest([1; 32]));
    let cases: [(Option<AdapterDigest>, &[TokenId], usize); 5] = [
        (None, &[1, 2, 3, 4, 5, 6], 2),
        (None, &[1, 2, 3, 5], 1),
        (None, &[3, 4], 0),
        (None, &[1], 0),
        (one, &[1, 2, 3, 4], 0),
    ];
    for (adapter, tokens, found) in cases {
        assert_eq!(
            pool.lookup(&chain(adapter, tokens, 2)).n_blocks(),
            found,
            "{adapter:?} {tokens:?}"
        );
    }
    pool.release(&tables);
    assert_eq!(
        (pool.lookup(&hashes).n_blocks(), pool.used()),
        (2, 0),
        "free blocks remember"
    );
    // A taken prefix and fresh blocks never overlap, and more than there is is refused whole.
    assert!(pool.allocate(pool.lookup(&hashes), 17, 0).is_none());
    assert!(pool.allocate(pool.lookup(&hashes), 15, 1).is_none());
    let all = pool.allocate(pool.lookup(&hashes), 16, 0).unwrap();
    assert_eq!(all[0].blocks[..2], tables[0].blocks[..]);
    pool.audit(all.iter()).unwrap();
    pool.release(&all);
    pool.audit(std::iter::empty()).unwrap();
}

#[test]
fn anonymous_blocks_go_first_then_tails_then_heads() {
    let mut pool = BlockPool::new(4, Groups::one(1));
    let hashes = chain(None, &[7, 8, 9], 1);
    let nothing = pool.lookup(&[]);
    let tables = pool.allocate(nothing, 4, 0).unwrap();
    (0..3).for_each(|block| pool.name(&tables, block, hashes[block]));
    pool.release(&tables);
    let nothing = pool.lookup(&[]);
    let mut grown = pool.allocate(nothing, 0, 0).unwrap();
    for left in [3, 2, 1, 0] {
        assert!(pool.extend(&mut grown, 0, 4 - left));
        assert_eq!(pool.lookup(&hashes).n_blocks(), left);
    }
    assert!(!pool.extend(&mut grown, 0, 5));
}

/// A group that sees everything and one that sees three tokens: a prefix is as long as both have what the next token sees.
#[test]
fn a_window_needs_only_what_it_sees() {
    let groups = Groups::new(1, vec![None, Some(3)], 2);
    let mut pool = BlockPool::new(20, groups);
    let hashes = chain(None, &[1, 2, 3, 4, 5, 6, 7], 1);
    let nothing = pool.lookup(&[]);
    let mut tables = pool.allocate(nothing, 8, 0).unwrap();
    let shape = |tables: &[Table]| -> Vec<Range<usize>> {
        tables.iter().map(|table| table.first..table.end()).collect()
    };
    assert_eq!(shape(&tables), [0..8, 0..4]);
    for computed in 1..=7 {
        pool.name(&tables, computed - 1, hashes[computed - 1]);
        pool.slide(&mut tables, computed);
        assert!(pool.extend(&mut tables, computed, 8));
        let first = (computed + 1).saturating_sub(3);
        assert_eq!(shape(&tables), [0..8, first..8.min(first + 4)]);
        pool.audit(tables.iter()).unwrap();
    }
    assert_eq!(pool.used(), 8 + 3);
    // What the window left is found, until it is taken: of a prefix of 5 it sees blocks 3 and 4.
    let prefix = pool.lookup(&hashes[..5]);
    assert_eq!(
        (prefix.n_blocks(), shape(&prefix.tables), prefix.free),
        (5, vec![0..5, 3..5], 2)
    );
    let other = pool.allocate(prefix, 6, 0).unwrap();
    assert_eq!(other[0].blocks[..5], tables[0].blocks[..5]);
    pool.audit(tables.iter().chain(&other)).unwrap();
    pool.release(&other);
    pool.release(&tables);
    pool.audit(std::iter::empty()).unwrap();
    // Someone takes blocks, the oldest first: what was behind the window long ago.
    let nothing = pool.lookup(&[]);
    let mut taken = pool.allocate(nothing, 1, 0).unwrap();
    let mut known = vec![];
    for len in 2..=16 {
        assert!(pool.extend(&mut taken[..1], 0, len));
        known.push(pool.lookup(&hashes).n_blocks());
    }
    assert!(
        known.is_sorted_by(|longer, shorter| longer >= shorter),
        "{known:?}"
    );
    assert_eq!((known[0], known[14]), (7, 0), "{known:?}");
    assert!(
        pool.lookup(&hashes[..5]).n_blocks() == 0,
        "not what the window of 5 tokens lacks"
    );
}

#[test]
fn any_history_balances() {
    for seed in 0..20 {
        let mut draws = 0;
        let mut below = |n: usize| {
            draws += 1;
            (rng::uniform(seed, 0, draws) * n as f64) as usize
        };
        let groups = match seed % 2 {
            0 => Groups::one(2),
            _ => Groups::new(2, vec![Some(3), None, Some(5)], 4),
        };
        let mut pool = BlockPool::new(30, groups);
        let mut held: Vec<Vec<Table>> = vec![];
        for _ in 0..2000 {
            if below(3) == 0 && !held.is_empty() {
                let tables = held.swap_remove(below(held.len()));
                pool.release(&tables);
            } else {
                let tokens: Vec<TokenId> = (0..1 + below(14)).map(|_| below(2) as TokenId).collect();
                let hashes = chain(None, &tokens, 2);
                let reusable = (tokens.len() - 1) / 2;
                let prefix = pool.lookup(&hashes[..reusable]);
                let known = prefix.n_blocks();
                let Some(mut tables) = pool.allocate(prefix, tokens.len(), 0) else {
                    continue;
                };
                for (block, &hash) in hashes.iter().enumerate().skip(known) {
                    pool.name(&tables, block, hash);
                    pool.slide(&mut tables, 2 * (block + 1));
                    if !pool.extend(&mut tables, 2 * (block + 1), tokens.len()) {
                        break;
                    }
                }
                held.push(tables);
            }
            pool.audit(held.iter().flatten()).unwrap();
        }
    }
}
