"""From phones to senones: the decision tree, the `senones` step, Kaldi's trees and topologies."""
