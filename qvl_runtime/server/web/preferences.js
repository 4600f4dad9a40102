// What the browser remembers of the user's choices: language and theme.

/** Keep a choice, where the browser allows it. */
export function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {} // forbidden: the choice holds until the page is left
}

/** A choice that was kept, or null. */
export function remembered(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** Use "light" or "dark"; null leaves it to the system. */
export function changeTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

/** The other theme than the one in use. */
export function otherTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  return (document.documentElement.dataset.theme ?? system) === "dark" ? "light" : "dark";
}
