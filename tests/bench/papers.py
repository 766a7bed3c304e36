"""What each paper says of its method, on its own models and data. None of it was measured here: the models and data sets
could not be had, so what we measured, on the lab's, stands beside it and not against it."""

PAPERS = {
    "clip_sae": "10 to 15 % of neurons and of SAE features can be steered; the dictionary gives thousands more such "
    "features; better CelebA, Waterbirds and typographic defence (its tables were not at hand)",
    "clip_heads": "heads of the last four layers are named by texts and by a language model; with the names one searches, segments "
    "and compares models (its tables were not at hand)",
    "second_order": "CLIP-B/32, layer 9: ImageNet after mean-ablating second-order effects 29.6 % (indirect 52.3 %, base "
    "63.3 %); adversarial pictures succeed in 5.3 to 22.7 % of five tasks",
    "attention_sink": "repeated tokens activate the neurons of the first token's sink; a patch of few neurons repairs it",
    "vlm_erasure": "hallucinated objects - 25.7 % (InstructBLIP) and - 23.8 % (LLaVA) against beam search",
    "mils": "MSR-VTT without training: METEOR 14.4 (a trained baseline 11.3); audio 12.4 METEOR; its pictures are preferred in "
    "62 to 79 % of pairs",
    "toto": "a 1.1B model's probes are competitive; best layer at half the depth; loss falls with compute as a power law",
    "videomae": "synthetic clips close 97.2 % of UCF101's gap under fine-tuning, 40.6 % under a linear probe; motion is the "
    "largest step (from 41 to 84.7 % of the gap)",
    "w2w": "people prefer its edits to sliders in 71.6 %, to prompting in 87.2 % of pairs",
    "diffusion_cf": "on par with or better than its baselines in flips, as its reviews tell (its tables were not at hand)",
}
