//! Reward-weighted regression (Peters and Schaal, 2007): the likelihood of each row times exp(reward / beta). Its weights
//! are known before the forward.

/// By row, with a mean of 1 over all rows of the file: the temperature and the rewards' zero change no learning rate.
pub fn factors(rewards: &[f32], beta: f64) -> Vec<f64> {
    let largest = rewards.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = rewards
        .iter()
        .map(|&reward| (f64::from(reward - largest) / beta).exp())
        .collect();
    let mean = weights.iter().sum::<f64>() / weights.len().max(1) as f64;
    weights.iter().map(|weight| weight / mean).collect()
}
