// A translator for tests that write other code to the same page for each case.
#pragma once

#include <memory>

#include "engine/translate/translator.h"

namespace anykvm::engine {

/// The ordinary one leaves a page that is rewritten too often to the reference engine, which would then be compared
/// with itself.
inline std::unique_ptr<Engine> make_patient_translator(bool exact = false) {
  auto translator = std::make_unique<translate::Translator>(exact);
  translator->translate_always();
  return translator;
}

}  // namespace anykvm::engine
