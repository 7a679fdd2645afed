// Keys of the Judge tab, announcements for screen readers, and the notice while the server is away. Text of the model is
// handled as plain text only.
(() => {
  const KEYS = {
    a: "vote-a", ArrowLeft: "vote-a", b: "vote-b", ArrowRight: "vote-b",
    t: "vote-tie", x: "vote-bad", s: "vote-skip", u: "undo",
  };
  const PRINTED = {
    "vote-a": "a ArrowLeft", "vote-b": "b ArrowRight", "vote-tie": "t", "vote-bad": "x", "vote-skip": "s", undo: "u",
  };
  const SETTLE = 800; // milliseconds for which a pair that came unasked takes no verdict: it was meant for the one before
  const BUSY = 3000; // milliseconds after which a verdict without an answer may be given again
  const PULSE = 2000; // milliseconds between two questions whether the server is there
  const WRITING = "input:not([type=checkbox]), textarea, select, [contenteditable], [role=slider], [role=radio], dialog";
  let pair = null;
  let shown = null;
  let noted = "";
  let asked = null; // the pair in whose place the rater has asked for another
  let unasked = 0; // when a pair last took the place of another by itself
  let sent = { showing: null, at: 0 };
  let away = false; // whether the server cannot be reached

  const showing = () => pair?.querySelector("[data-showing]")?.dataset.showing ?? null;
  const visible = (element) => element !== null && element.offsetParent !== null;

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.defaultPrevented) return;
    // On a keyboard without Latin letters, the key in the place of the letter.
    const letter = event.key.length === 1 && event.key > "\x7f" ? event.code.replace("Key", "") : event.key;
    const id = KEYS[letter.length === 1 ? letter.toLowerCase() : letter];
    if (!id || !shortcuts() || event.target.closest?.(WRITING)) return;
    // On a tab the arrows choose the tab beside it.
    if (event.key.startsWith("Arrow") && event.target.closest?.("[role=tab]")) return;
    const button = document.getElementById(id);
    if (!visible(button)) return;
    event.preventDefault();
    button.click();
  });

  // Enter in "Judging as" leaves the field, which stores the name; the next key is a verdict again.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) event.target.closest?.("#who input")?.blur();
  });

  // A name brings a pair of its own, and so does Undo: these are no surprise.
  const expected = () => {
    asked = showing();
  };
  document.addEventListener("focusout", (event) => {
    if (event.target.closest?.("#who")) expected();
  });

  // One verdict per pair, however often a button or key is pressed before the next pair appears.
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("#actions button");
    if (!button) return;
    const now = showing();
    if (button.id === "undo" && !away) return expected();
    const again = now !== null && sent.showing === now && Date.now() - sent.at < BUSY;
    if (away || now === null || again || Date.now() - unasked < SETTLE) {
      event.stopImmediatePropagation();
      event.preventDefault();
      return;
    }
    sent = { showing: now, at: Date.now() };
    expected();
    button.classList.add("z-pressed");
    setTimeout(() => button.classList.remove("z-pressed"), 160);
    setTimeout(ask, BUSY / 4); // a verdict that has not been answered by now may be lost
  }, true);

  // Software that takes dictation types: whoever uses it switches the keys off. The browser remembers that.
  const OFF = "zorl-no-shortcuts";
  const shortcuts = () => localStorage.getItem(OFF) === null;
  const choice = document.createElement("label");
  choice.id = "shortcuts";
  choice.innerHTML = '<input type="checkbox"> Keyboard shortcuts';
  const box = choice.querySelector("input");
  const mark = () => {
    box.checked = shortcuts();
    document.documentElement.classList.toggle("z-no-shortcuts", !shortcuts());
  };
  box.addEventListener("change", () => {
    if (box.checked) localStorage.removeItem(OFF);
    else localStorage.setItem(OFF, "yes");
    mark();
    settle(); // so that screen readers no longer announce the keys, or do again
  });
  mark();

  const announcer = document.createElement("div");
  announcer.id = "announcer";
  announcer.className = "z-unseen";
  announcer.setAttribute("role", "status");
  announcer.setAttribute("aria-live", "polite");

  const disable = () => {
    for (const id of Object.keys(PRINTED)) {
      const idle = id === "undo" ? document.querySelector("[data-undo=yes]") === null : showing() === null;
      document.getElementById(id)?.setAttribute("aria-disabled", String(away || idle));
    }
  };

  // Gradio tells of a lost connection in a corner, and takes nothing more until the page is loaded again.
  const lost = document.createElement("p");
  lost.id = "lost";
  lost.className = "z-notice";
  lost.setAttribute("role", "alert");
  const ask = async () => {
    const { root = "", api_prefix: prefix = "" } = window.gradio_config ?? {};
    const there = await fetch(`${root}${prefix}/app_id`, { cache: "no-store" }).then((answer) => answer.status < 500, () => false);
    if (there && away) location.reload();
    if (there || away) return;
    away = true;
    const unsaved = sent.showing !== null && sent.showing === showing() ? "Your last verdict was not saved; this" : "This";
    lost.textContent = `The server cannot be reached. ${unsaved} page reconnects by itself.`;
    document.documentElement.classList.add("z-away");
    disable();
  };
  setInterval(ask, PULSE);

  const said = (selector) => pair.querySelector(selector)?.textContent.trim() ?? "";
  const sentence = (words) => (/[.!?…]$/.test(words) ? words : `${words}.`);
  const look = () => {
    disable();
    const now = showing();
    const note = document.querySelector("#notice p")?.textContent ?? "";
    if (now === shown && note === noted) return;
    if (shown && now && now !== shown && asked !== shown) unasked = Date.now();
    sent = { showing: null, at: 0 };
    shown = now;
    noted = note;
    const news = now === null
      ? said("h2")
      : ["New pair", `Prompt: ${said(".z-prompt .z-text, .z-turns")}`, `Answer A: ${said(".z-a .z-text")}`,
        `Answer B: ${said(".z-b .z-text")}`].map(sentence).join(" ");
    announcer.textContent = `${note} ${news}`.trim();
  };

  // Details that somebody has opened stay open when their figures change.
  const open = new Set();
  const key = (details) => details.closest("[aria-label]")?.getAttribute("aria-label").split(":")[0] ?? "";
  document.addEventListener("toggle", (event) => {
    if (!event.target.closest?.("#charts")) return;
    if (event.target.open) open.add(key(event.target));
    else if (event.target.isConnected) open.delete(key(event.target));
  }, true);

  // Gradio builds the page by script, and again when a tab is opened: find its parts whenever they change.
  const settle = () => {
    if (!announcer.isConnected) document.body.append(announcer, lost);
    if (!choice.isConnected) document.getElementById("actions")?.append(choice);
    const found = document.getElementById("pair");
    if (found !== pair) {
      pair = found;
      shown = undefined;
    }
    for (const [id, keys] of Object.entries(PRINTED)) {
      const button = document.getElementById(id);
      if (button && button.hasAttribute("aria-keyshortcuts") !== shortcuts()) {
        if (shortcuts()) button.setAttribute("aria-keyshortcuts", keys);
        else button.removeAttribute("aria-keyshortcuts");
      }
    }
    for (const details of document.querySelectorAll("#charts details:not([open])")) {
      if (open.has(key(details))) details.open = true;
    }
    if (pair) look();
  };
  new MutationObserver(settle).observe(document.documentElement, { childList: true, subtree: true });
})();
